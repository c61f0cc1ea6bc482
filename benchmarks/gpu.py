"""What training does on a GPU: whether it is right, how fast it is, and what holds it up. The most telling parts
come first.

  environment  the card, CUDA, cuDNN, driver and the flags that change results
  trains       one epoch with each augmentation and each option of a recipe, and the operations without a
               deterministic form
  same         whether one seed gives the same weights twice, and when it is interrupted and resumed
  parity       logits on the device against those on the processor; `bundle` allows 1e-4
  speed        training images a second by network, batch size and augmentation
  waits        kernels and synchronisations a batch, and how long the device works in it
  ceiling      images a second of bare steps on one batch that lies ready, deterministic or not
  augment      milliseconds that each augmentation takes for a batch
  full         what is said when memory runs out, and whether autocast is left on
  float16      the losses with a scaled loss, as on a card without bfloat16
  moved        a checkpoint of the device that is resumed on the processor
  compiled     images a second of a compiled network, and how long compiling takes

usage: gpu.py [PART ...] [--seconds 170] [--out FILE.json] [--tiny]
The JSON is written after each part. No part begins that may not end within the seconds. --tiny runs on any
processor in a minute.
"""

import argparse
import collections
import contextlib
import gc
import time
import traceback
import warnings
from pathlib import Path
from tempfile import mkdtemp
from unittest import mock

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import Callback, IntToFloatTensor, Pipeline, TensorImageBW, default_device

from cxr_study.core.run import StudyError, atomic_write, hardware, seed_everything, to_json
from cxr_study.data.images import Preprocess
from cxr_study.train import recipe as learning
from cxr_study.train.loaders import AUGMENTATION_STEPS
from cxr_study.train.networks import Classifier, create_body
from cxr_study.train.recipe import Recipe, SeedEpochs
from cxr_study.train.training import Training, TrainingData, learner, predict_logits, train

IMAGES = 2048  # Different images at most; an epoch draws them again


class Bench:
    "Device, sizes and clock of a run"

    def __init__(self, tiny, seconds):
        self.device, self.tiny, self.began, self.seconds = (
            default_device(),
            tiny,
            time.time(),
            seconds,
        )
        self.size, self.steps = (64, 3) if tiny else (224, 40)
        self.small, self.large = (
            ('test_resnet', 'test_efficientnet') if tiny else ('resnet18', 'tf_efficientnetv2_b0')
        )
        self.batches = (8,) if tiny else (64, 256, 512)

    def left(self):
        return self.seconds - (time.time() - self.began)

    def wait(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def clear(self):
        gc.collect()
        torch.clear_autocast_cache()
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self):
        return (
            round(torch.cuda.max_memory_allocated() / 2**30, 2)
            if self.device.type == 'cuda'
            else None
        )


def films(n, size, bs):
    "(uint8 [m, size, size] in which the sick have a bright patch, a table of n rows; one batch is validation)"
    rng, m = np.random.default_rng(0), min(n, IMAGES)
    images, label = rng.integers(0, 200, (m, size, size), np.uint8), np.arange(n) % 2
    images[1::2, size // 4 : size // 2, size // 4 : size // 2] += 40
    names = [str(i) for i in range(n)]
    return images, pd.DataFrame(
        dict(
            row=np.arange(n) % (m - m % 2),
            image_id=names,
            patient_id=names,
            label=label,
            split=['val'] * bs + ['train'] * (n - bs),
        )
    )


def trained(bench, arch, size, bs, steps, file=None, say=str, device=None, **choices):
    "(network, history, images) of a training of `steps` batches an epoch"
    images, table = films(bs * (steps + 1), size, bs)
    recipe = Recipe(**{**dict(epochs=2, batch_size=bs, lr=1e-3), **choices})
    checkpoint = file or Path(mkdtemp()) / 'checkpoint.pt'
    data = TrainingData(images, table, Preprocess(size=size))
    training = Training(arch, recipe=recipe)
    model, history = train(training, data, checkpoint, say, device or bench.device)
    return model, history, images


def same(a, b):
    return all(
        torch.equal(x.cpu(), y.cpu())
        for x, y in zip(a.state_dict().values(), b.state_dict().values())
    )


class Stop(KeyboardInterrupt):
    "Somebody pressed Ctrl-C"


def stop(line):
    raise Stop


# Whether it is right


def environment(bench):
    found = dict(hardware(), torch=torch.__version__, device_type=bench.device.type)
    if bench.device.type == 'cuda':
        found.update(
            arch=torch.cuda.get_arch_list(),
            free_gb=round(torch.cuda.mem_get_info()[0] / 2**30, 1),
            bf16=torch.cuda.is_bf16_supported(),
            multiprocessors=torch.cuda.get_device_properties(0).multi_processor_count,
        )
    return found


def trains(bench):
    choices = [dict(augment=a) for a in AUGMENTATION_STEPS]
    choices += [
        dict(mix='mixup'),
        dict(mix='cutmix'),
        dict(ema=0.9),
        dict(accumulate=2),
        dict(clip=0.1),
        dict(loss='focal'),
        dict(loss='weighted'),
        dict(sampling='balanced'),
        dict(validate='stress'),
        dict(precision='fp32'),
        dict(smoothing=0.1),
    ]
    found = {}
    for choice in choices:
        try:
            _, history, _ = trained(
                bench, bench.small, 32 if bench.tiny else 64, 8, 3, epochs=1, **choice
            )
            found[str(choice)] = dict(
                train_loss=float(history.train_loss.iloc[0]),
                nondeterministic=history.attrs['nondeterministic'],
            )
        except Exception as error:
            found[str(choice)] = dict(error=f"{type(error).__name__}: {error}"[:300])
    return found


def same_weights(bench):
    found, size = {}, bench.size // 2
    for arch, augment in (
        (bench.small, 'standard'),
        (bench.small, 'shift'),
        (bench.large, 'stretch'),
    ):
        a, b = (trained(bench, arch, size, 16, 4, augment=augment)[0] for _ in range(2))
        found[f'{arch} {augment}'] = same(a, b)
    file = Path(mkdtemp()) / 'checkpoint.pt'
    with contextlib.suppress(Stop):
        trained(bench, bench.small, size, 16, 4, file, stop)
    resumed, whole = (trained(bench, bench.small, size, 16, 4, f)[0] for f in (file, None))
    found['interrupted and resumed'] = same(resumed, whole)
    return found


def parity(bench):
    found = {}
    for arch in (bench.small, bench.large):
        model, _, images = trained(bench, arch, bench.size // 2, 16, 8, epochs=1)
        rows = range(min(48, len(images)))
        here, there = (
            predict_logits(model, images, rows, device=device) for device in (bench.device, 'cpu')
        )
        found[arch] = dict(
            largest_difference=float(np.abs(here - there).max()),
            deviation_of_logits=float(there.std()),
        )
        if bench.device.type == 'cuda':
            found[arch]['with_tf32'] = with_tf32(model, images, rows, there)
    return found


def with_tf32(model, images, rows, exact):
    "Largest difference that TF32 would make"
    x = torch.from_numpy(images[list(rows)])[:, None].float().to('cuda') / 255
    torch.backends.cudnn.allow_tf32 = True
    with torch.inference_mode():
        logits = model.to('cuda').eval()(x)[:, 0].cpu().numpy()
    seed_everything(0)  # Off again
    return float(np.abs(logits - exact).max())


# How fast it is


class Clock(Callback):
    "Seconds of the training part of each epoch"

    order = 95

    def __init__(self, wait):
        self.wait, self.seconds = wait, []

    def before_train(self):
        self.wait()
        self.start = time.perf_counter()

    def after_train(self):
        self.wait()
        self.seconds.append(time.perf_counter() - self.start)


def quick_learner(bench, arch, bs, **choices):
    images, table = films(bs * (bench.steps + 1), bench.size, bs)
    data = TrainingData(images, table, Preprocess(size=bench.size))
    training = Training(arch, recipe=Recipe(batch_size=bs, lr=1e-3, **choices))
    return learner(training, data, bench.device)


def run_epochs(learn, n, *callbacks):
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(n, 1e-3, cbs=[SeedEpochs(0), *callbacks])


def speed_of(bench, arch, bs, **choices):
    bench.clear()
    learn, clock = quick_learner(bench, arch, bs, **choices), Clock(bench.wait)
    run_epochs(learn, 3, clock)
    found = dict(
        images_per_second=round(bench.steps * bs / min(clock.seconds[1:])),
        ms_per_batch=round(1e3 * min(clock.seconds[1:]) / bench.steps, 2),
        peak_gb=bench.peak(),
    )
    for loader in learn.dls.loaders:
        loader.dataset.images = None
    return found


def speed(bench):
    wanted = [
        (bench.small, bs, augment) for bs in bench.batches for augment in ('standard', 'stretch')
    ]
    wanted += [(bench.large, bs, 'stretch') for bs in bench.batches[:2]] + [
        (bench.small, bench.batches[-1], 'none')
    ]
    found = {}
    for arch, bs, augment in wanted:
        if bench.left() < 5:
            break
        found[f'{arch} {bs} {augment}'] = speed_of(bench, arch, bs, augment=augment)
    return found


class Watched(Clock):
    "Counts where the host waits for the device in the training part of an epoch"

    def before_train(self):
        super().before_train()
        torch.cuda.set_sync_debug_mode('warn')

    def after_train(self):
        torch.cuda.set_sync_debug_mode('default')
        super().after_train()


def waits(bench):
    if bench.device.type != 'cuda':
        return "needs a GPU"
    from torch.profiler import ProfilerActivity, profile

    found = {}
    for arch in (bench.small, bench.large):
        bench.clear()
        learn = quick_learner(bench, arch, bench.batches[0], augment='stretch')
        run_epochs(learn, 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            run_epochs(learn, 1, Watched(bench.wait))
        places = collections.Counter(
            f"{Path(w.filename).name}:{w.lineno}" for w in caught if 'synchroniz' in str(w.message)
        )
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            run_epochs(learn, 1)
        events = profiled.key_averages()
        longest = sorted(events, key=lambda e: -e.self_device_time_total)[:15]
        found[arch] = dict(
            synchronisations={k: round(n / bench.steps, 2) for k, n in places.most_common(8)},
            kernels=round(sum(e.count for e in events if 'LaunchKernel' in e.key) / bench.steps),
            device_ms=round(sum(e.self_device_time_total for e in events) / 1e3 / bench.steps, 2),
            longest={
                e.key[:60]: [
                    round(e.count / bench.steps, 1),
                    round(e.self_device_time_total / 1e3 / bench.steps, 3),
                ]
                for e in longest
            },
        )
    return found


def bare(bench, arch, bs, deterministic, compiled=False):
    "Images a second, and milliseconds of the host, of bare steps on one batch"
    bench.clear()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    model = (
        Classifier(create_body(arch), Preprocess(size=bench.size))
        .to(bench.device, memory_format=torch.channels_last)
        .train()
    )
    if compiled:
        model.compile()
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = (
        torch.rand(bs, 1, bench.size, bench.size, device=bench.device),
        torch.zeros(bs, device=bench.device),
    )

    def step():
        with torch.autocast(bench.device.type, torch.bfloat16):
            z = model(x)[:, 0]
        torch.nn.functional.binary_cross_entropy_with_logits(z.float(), y).backward()
        optimiser.step()
        optimiser.zero_grad()

    for _ in range(5):
        step()
    bench.wait()
    began = time.perf_counter()
    for _ in range(bench.steps):
        step()
    host = time.perf_counter() - began
    bench.wait()
    seconds = time.perf_counter() - began
    seed_everything(0)
    return dict(
        images_per_second=round(bs * bench.steps / seconds),
        host_ms=round(1e3 * host / bench.steps, 2),
    )


def ceiling(bench):
    return {
        f"{arch} {bs} {'deterministic' if deterministic else 'free'}": bare(
            bench, arch, bs, deterministic
        )
        for arch in (bench.small, bench.large)
        for bs in bench.batches[:2]
        for deterministic in (True, False)
    }


def augment(bench):
    bs, found = bench.batches[-1], {}
    x = TensorImageBW(
        torch.randint(
            0, 255, (bs, 1, bench.size, bench.size), dtype=torch.uint8, device=bench.device
        )
    )
    seed_everything(0)
    for name, make in AUGMENTATION_STEPS.items():
        change = Pipeline([IntToFloatTensor(), *make()], split_idx=0)
        change((x,))
        bench.wait()
        began = time.perf_counter()
        for _ in range(5):
            change((x,))
        host = time.perf_counter() - began
        bench.wait()
        found[name] = dict(
            ms=round(1e3 * (time.perf_counter() - began) / 5, 2), host_ms=round(1e3 * host / 5, 2)
        )
    return dict(images=bs, size=bench.size, **found)


# What can go wrong


def full(bench):
    if bench.device.type != 'cuda':
        return "needs a GPU"
    torch.cuda.set_per_process_memory_fraction(0.05)
    try:
        trained(bench, bench.small, bench.size, 1024, 2, epochs=1)
        said = "did not run out"
    except StudyError as error:
        said = str(error)
    except Exception as error:
        said = f"not a StudyError: {type(error).__name__}: {error}"[:300]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return dict(said=said, autocast_left_on=torch.is_autocast_enabled('cuda'))


def float16(bench):
    "Losses of an epoch with the scaled loss and without"
    if bench.device.type != 'cuda':
        return "needs a GPU"
    with mock.patch.object(learning, 'has_bf16', lambda device: False):
        scaled = trained(bench, bench.small, bench.size // 2, 16, 8)[1]
    exact = trained(bench, bench.small, bench.size // 2, 16, 8, precision='fp32')[1]
    return dict(scaled=scaled.to_dict('list'), float32=exact.to_dict('list'))


def moved(bench):
    file, asked = Path(mkdtemp()) / 'checkpoint.pt', dict(precision='fp32', ema=0.9)
    with contextlib.suppress(Stop):
        trained(bench, 'test_resnet', 32, 8, 4, file, stop, **asked)
    return trained(bench, 'test_resnet', 32, 8, 4, file, device=torch.device('cpu'), **asked)[
        1
    ].to_dict('list')


def compiled(bench):
    began, bs = time.time(), bench.batches[min(1, len(bench.batches) - 1)]
    found = bare(bench, bench.small, bs, True, compiled=not bench.tiny)
    return dict(found, batch=bs, arch=bench.small, seconds_in_all=round(time.time() - began, 1))


# Name -> function, and seconds that it may take on an H100
PARTS = dict(
    environment=(environment, 3),
    trains=(trains, 25),
    same=(same_weights, 20),
    parity=(parity, 15),
    speed=(speed, 15),
    waits=(waits, 20),
    ceiling=(ceiling, 15),
    augment=(augment, 5),
    full=(full, 6),
    float16=(float16, 6),
    moved=(moved, 5),
    compiled=(compiled, 75),
)


def attempt(bench, name):
    "What a part found, or the error that ended it"
    bench.clear()
    began = time.time()
    try:
        found = PARTS[name][0](bench)
    except Exception as error:
        found = dict(
            error=f"{type(error).__name__}: {error}"[:500], trace=traceback.format_exc()[-1500:]
        )
    return dict(found=found, seconds=round(time.time() - began, 1))


def main(args):
    bench, found = Bench(args.tiny, args.seconds), dict(tiny=args.tiny)
    seed_everything(0)
    for name in args.parts or PARTS:
        if bench.left() < (0 if args.tiny else PARTS[name][1]):
            found[name] = dict(skipped=f"{bench.left():.0f} s were left")
        else:
            found[name] = attempt(bench, name)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out) as f:
            f.write_text(to_json(found, indent=1) + "\n")
        print(
            f"[{time.time() - bench.began:4.0f} s] {name}: {to_json(found[name])[:1500]}",
            flush=True,
        )
    return found


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'parts', nargs='*', metavar='PART', help=f"of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument('--seconds', type=float, default=170)
    parser.add_argument('--out', type=Path, default=Path('results/benchmarks/gpu.json'))
    parser.add_argument('--tiny', action='store_true')
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    main(args)
