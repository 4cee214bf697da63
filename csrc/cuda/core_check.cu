#include <cuda_runtime.h>

#include "core_check.h"

namespace fae::cuda {

namespace {

__global__ void core_probe_kernel(const CoreProbe* probes, CoreAnswer* answers, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) answers[i] = answer_core_probe(probes[i]);
}

}  // namespace

int run_core_probes(const CoreProbe* probes, CoreAnswer* answers, int count) {
  CoreProbe* d_probes = nullptr;
  CoreAnswer* d_answers = nullptr;
  cudaError_t error = cudaMalloc(&d_probes, sizeof(CoreProbe) * count);
  if (error == cudaSuccess) error = cudaMalloc(&d_answers, sizeof(CoreAnswer) * count);
  if (error == cudaSuccess) error = cudaMemcpy(d_probes, probes, sizeof(CoreProbe) * count, cudaMemcpyHostToDevice);
  if (error == cudaSuccess) {
    core_probe_kernel<<<(count + 127) / 128, 128>>>(d_probes, d_answers, count);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) error = cudaMemcpy(answers, d_answers, sizeof(CoreAnswer) * count, cudaMemcpyDeviceToHost);
  cudaFree(d_answers);
  cudaFree(d_probes);
  return error;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fae::cuda
