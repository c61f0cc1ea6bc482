"""The LitServe service that benchmarks/serving.py measures: serving_litserve.py RUN PORT BATCH DECODE"""

import sys

import litserve as ls
import numpy as np
import torch
from fastapi import Request
from serving import decoder

from cxr_study.core.run import Run
from cxr_study.train.networks import load_model


class API(ls.LitAPI):
    "The network of a run, one thread of PyTorch a worker"

    def setup(self, device):
        torch.set_num_threads(1)
        self.model = load_model(Run(self.run, verify=False)).to(memory_format=torch.channels_last)
        self.to_grey = decoder(self.model.spec, self.decode)

    def decode_request(self, request: Request):
        return self.to_grey(request["file"].file.read())

    def batch(self, inputs):
        return np.stack(inputs)

    def unbatch(self, output):
        return list(output)

    def predict(self, x):
        x = torch.from_numpy(x if x.ndim == 3 else x[None])[:, None].float() / 255
        with torch.inference_mode():
            return self.model(x)[:, 0].tolist()

    def encode_response(self, output):
        return dict(logit=output[0] if isinstance(output, list) else output)


if __name__ == "__main__":
    run, port, batch, decode = sys.argv[1:]
    api = API(max_batch_size=int(batch), **(dict(batch_timeout=0.005) if int(batch) > 1 else {}))
    api.run, api.decode = run, decode
    ls.LitServer(api, accelerator="cpu", workers_per_device=2, timeout=60).run(
        port=int(port), log_level="warning", generate_client_file=False, num_api_servers=1
    )
