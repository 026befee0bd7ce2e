// SPDX-License-Identifier: Apache-2.0
// What the files with seeded defects share. Each defect is a kernel in two versions, right and with one mistake; right,
// it turns x around: out[i] = x[n - 1 - i]. Launchers are extern "C" (bool right, const float* x, float* out, stream).
#pragma once
#include "launch.cuh"
#include "primitives.cuh"

// The body of a launcher: starts the version that was asked for.
#define RUN(kernel, grid, block, shared)                                       \
  return right ? FVM_LAUNCH(kernel<true>, grid, block, shared, stream, x, out) \
               : FVM_LAUNCH(kernel<false>, grid, block, shared, stream, x, out)
