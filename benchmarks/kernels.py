"""Time the C kernels on every convolution of a network: forward, dX and dW, one core.

    python benchmarks/kernels.py [--net mcunet-5fps] [--json] [--flags="-O3 ..."]

A layer's time is the best of many calls in a row, so its data is as near as its size allows.  The
two sums at the end come from passes over all layers, each with its own buffers, as in a training
step.  Layer tables come from $MODICUM_SHARED/weights (default: ../shared beside the repository).
"""

import argparse
import ctypes
import json
import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "src" / "modicum" / "emit" / "c"
SHARED = Path(os.environ.get("MODICUM_SHARED", ROOT.parent / "shared"))
FLAGS = "-O3 -march=native -ffp-contract=fast -fno-math-errno"
PASSES = ("forward", "dx", "dw")

TIMER = r"""
#include <stdlib.h>
#include <time.h>
#include "mo_kernels.h"

typedef struct {
  mo_conv_t g;
  float *x, *y, *w, *b;
} layer_t;

static float *filled(int32_t n) {
  float *p = aligned_alloc(64, ((size_t)n * sizeof(float) + 63) / 64 * 64);
  for (int32_t i = 0; i < n; i++) p[i] = (float)(i * 7919 % 1009) / 1009.0f - 0.5f;
  return p;
}

layer_t *make_layers(const mo_conv_t *g, int n) {
  layer_t *layers = calloc((size_t)n, sizeof(layer_t));
  for (int i = 0; i < n; i++) {
    layers[i].g = g[i];
    layers[i].x = filled(g[i].in_h * g[i].in_w * g[i].in_c);
    layers[i].y = filled(g[i].out_h * g[i].out_w * g[i].out_c);
    layers[i].w = filled(g[i].k_h * g[i].k_w * g[i].in_c / g[i].groups * g[i].out_c);
    layers[i].b = filled(g[i].out_c);
  }
  return layers;
}

/* dX overwrites x and dW overwrites w: only the time matters here */
static void run(layer_t *l, int pass) {
  const mo_conv_t *g = &l->g;
  if (g->groups > 1) {
    if (pass == 0) mo_depthwise_forward(l->y, l->x, l->w, l->b, g, 0.0f, 6.0f);
    if (pass == 1) mo_depthwise_dx(l->x, l->y, l->w, g, 0);
    if (pass == 2) mo_depthwise_dw(l->w, l->y, l->x, g, 0, g->k_h, 0);
  } else {
    if (pass == 0) mo_conv2d_forward(l->y, l->x, l->w, l->b, g, 0.0f, 6.0f);
    if (pass == 1) mo_conv2d_dx(l->x, l->y, l->w, g, 0);
    if (pass == 2) mo_conv2d_dw(l->w, l->y, l->x, g, 0, g->out_c, 0);
  }
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* seconds per call, the best of `trials` rounds of `calls` */
double time_layer(layer_t *layers, int i, int pass, int trials, int calls) {
  double best = 1e9;
  for (int trial = 0; trial < trials; trial++) {
    const double start = now();
    for (int call = 0; call < calls; call++) run(&layers[i], pass);
    const double seconds = (now() - start) / calls;
    best = seconds < best ? seconds : best;
  }
  return best;
}

/* seconds of one pass over all layers, forward only or with both gradients */
double time_network(layer_t *layers, int n, int train, int trials) {
  double best = 1e9;
  for (int trial = 0; trial < trials; trial++) {
    const double start = now();
    for (int i = 0; i < n; i++) run(&layers[i], 0);
    for (int i = n - 1; train && i >= 0; i--) {
      if (i > 0) run(&layers[i], 1);
      run(&layers[i], 2);
    }
    const double seconds = now() - start;
    best = seconds < best ? seconds : best;
  }
  return best;
}
"""

FIELDS = (
    "in_h in_w in_c out_h out_w out_c k_h k_w stride_h stride_w pad_t pad_l dil_h dil_w groups"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--net", default="mcunet-5fps")
    parser.add_argument("--cc", default="gcc")
    parser.add_argument("--flags", default=FLAGS)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    names, geometries = layer_table(SHARED / "weights" / f"{options.net}.json")
    with tempfile.TemporaryDirectory() as folder:
        library = compile_kernels(Path(folder), options.cc, options.flags.split())
        result = measure(library, names, geometries)
    result |= {"net": options.net, "compiler": f"{options.cc} {options.flags}"}
    print(json.dumps(result, indent=1) if options.json else table(result))


def layer_table(path: Path) -> tuple[list[str], list[list[int]]]:
    """Every convolution of the net, the classifier among them, as the fields of mo_conv_t."""
    names, geometries = [], []
    for layer in json.loads(path.read_text())["layers"]:
        if "kernel_size" not in layer:
            continue
        k_h, k_w = layer["kernel_size"]
        size, out = layer.get("in_shape", 1), layer.get("out_shape", 1)
        stride, groups = layer["stride"], layer["groups"]
        channels = layer["in_channel"], layer["out_channel"]
        shape = [size, size, channels[0], out, out, channels[1], k_h, k_w]
        names.append(layer["name"])
        geometries.append([*shape, stride, stride, k_h // 2, k_w // 2, 1, 1, groups])
    return names, geometries


def compile_kernels(folder: Path, compiler: str, flags: list[str]) -> ctypes.CDLL:
    timer, library = folder / "timer.c", folder / "libtimer.so"
    timer.write_text(TIMER)
    sources = [str(source) for source in sorted(KERNELS.glob("*.c"))]
    command = [compiler, "-std=gnu11", *flags, "-fPIC", "-shared", f"-I{KERNELS}", str(timer)]
    subprocess.run([*command, *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.make_layers.restype = ctypes.c_void_p
    loaded.time_layer.restype = loaded.time_network.restype = ctypes.c_double
    return loaded


def measure(library: ctypes.CDLL, names: list[str], geometries: list[list[int]]) -> dict:
    flat = [value for geometry in geometries for value in geometry]
    layers = ctypes.c_void_p(
        library.make_layers((ctypes.c_int32 * len(flat))(*flat), len(geometries))
    )
    rows = []
    for i, (name, geometry) in enumerate(zip(names, geometries, strict=True)):
        g = dict(zip(FIELDS, geometry, strict=True))
        macs = g["out_h"] * g["out_w"] * g["out_c"]
        macs *= g["k_h"] * g["k_w"] * g["in_c"] // g["groups"]
        calls = max(1, 1_000_000 // macs)
        micros = {
            p: 1e6 * library.time_layer(layers, i, n, 15, calls) for n, p in enumerate(PASSES)
        }
        kind = "depthwise" if g["groups"] > 1 else "pointwise" if g["k_h"] == 1 else "general"
        rows.append(dict(name=name, kind=kind, macs=macs, geometry=g, micros=micros))
    forward, step = (1e3 * library.time_network(layers, len(names), t, 40) for t in (0, 1))
    return dict(layers=rows, forward_ms=forward, step_ms=step)


def table(result: dict) -> str:
    lines = [f"{'layer':24}{'shape':>30}{'kMAC':>8}" + "".join(f"{p:>17}" for p in PASSES)]
    lines.append(" " * 62 + f"{'us   GFLOP/s':>17}" * 3)
    totals: dict[str, list[float]] = {}
    for row in result["layers"]:
        g, macs = row["geometry"], row["macs"]
        shape = f"{g['in_h']}x{g['in_w']}x{g['in_c']} -> {g['out_h']}x{g['out_w']}x{g['out_c']}"
        shape += f" k{g['k_h']}"
        cells = [f"{us:8.1f}{2e-3 * macs / us:9.1f}" for us in row["micros"].values()]
        lines.append(f"{row['name']:24}{shape:>30}{macs / 1e3:8.0f}" + "".join(cells))
        total = totals.setdefault(row["kind"], [0.0] * 4)
        for i, value in enumerate([macs, *row["micros"].values()]):
            total[i] += value
    for kind, (macs, *micros) in totals.items():
        cells = [f"{us:8.1f}{2e-3 * macs / us:9.1f}" for us in micros]
        lines.append(f"{'all ' + kind:54}{macs / 1e3:8.0f}" + "".join(cells))
    lines.append(f"one pass over all layers: forward {result['forward_ms']:.2f} ms,")
    lines.append(
        f"forward and both gradients {result['step_ms']:.2f} ms (no dX of the first layer)"
    )
    return "\n".join([f"{result['net']}, {result['compiler']}", *lines])


if __name__ == "__main__":
    main()
