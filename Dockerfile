# Two images of one file.
#   docker build -t cxr-study .                        docker run --rm -p 8000:8000 cxr-study
#   docker build --target evaluate -t cxr-evaluate .   docker run --rm -v $PWD/models:/models:ro -v $PWD/outputs:/outputs -v $CXR_DATA:/data:ro -e CXR_DATA=/data cxr-evaluate
# The first prints an address with a token: whoever can reach a service can use it. Read-only: add --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges.
# The base image is pinned by digest: the multi-platform index of 19 September 2026, as github.com/docker-library/repo-info lists it (repos/python/remote/3.11-slim-bookworm.md at 40cdaf34).
# `docker buildx imagetools inspect python:3.11-slim-bookworm` shows the newest.
ARG BASE_IMAGE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# Packages are installed here, each checked against its hash, into an environment that itself has no pip. What the service never loads is left out: a second copy of ONNX Runtime for C programs,
# its tools, decoders of picture formats that are refused anyway.
FROM ${BASE_IMAGE} AS packages
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
COPY requirements-serve.lock /
RUN /opt/pip/bin/pip --disable-pip-version-check --python /opt/venv/bin/python install --no-cache-dir --require-hashes --only-binary :all: -r /requirements-serve.lock \
 && cd /opt/venv/lib/python3*/site-packages \
 && rm -rf onnxruntime/transformers onnxruntime/tools onnxruntime/quantization onnxruntime/capi/libonnxruntime.so.* numpy/_core/include \
           PIL/_avif* PIL/_webp* PIL/_imagingft* pillow.libs/libavif* pillow.libs/libwebp* pillow.libs/libfreetype* pillow.libs/libharfbuzz* pillow.libs/libbrotli* \
 && python3 -c "import json, pathlib; [f.write_text(json.dumps(json.loads(f.read_text()), separators=(',', ':'))) for f in pathlib.Path('highdicom/_standard').glob('*.json')]" \
 && find . -name '*.pyi' -delete && find . -type d \( -name tests -o -name test \) -prune -exec rm -rf {} +

FROM packages AS packages-evaluate
COPY requirements-evaluate.lock /
RUN /opt/pip/bin/pip --disable-pip-version-check --python /opt/venv/bin/python install --no-cache-dir --require-hashes --only-binary :all: -r /requirements-evaluate.lock

# What both images share: the library as it is, no build, a user of its own.
FROM ${BASE_IMAGE} AS library
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin cxr && mkdir -m 777 /outputs /models
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1 CXR_CACHE=/tmp/cxr-cache MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /app
COPY settings.ini LICENSE NOTICE /app/
COPY cxr_study /app/cxr_study
RUN python3 -m compileall -q /app/cxr_study && printf '#!/opt/venv/bin/python\nfrom cxr_study.cli import main\nmain()\n' > /usr/local/bin/cxr-study && chmod 755 /usr/local/bin/cxr-study

FROM library AS evaluate
COPY --from=packages-evaluate /opt/venv /opt/venv
USER 10001
CMD ["cxr-study", "evaluate-bundle", "/models", "--out", "/outputs"]

FROM library AS serve
COPY --from=packages /opt/venv /opt/venv
COPY models /app/models
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Fails if the service does not answer in time, and if it says that it is not ready, as it does when its workers are stuck.
HEALTHCHECK --interval=30s --timeout=3s --start-period=10s --retries=3 CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
CMD ["cxr-study", "serve", "--host", "0.0.0.0"]
