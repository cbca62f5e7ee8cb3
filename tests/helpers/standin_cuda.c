/* A libcuda.so.1 that has one sm_90 device and runs nothing: it notes what Triton would launch.

   `expect` tells the sizes of the parameters of the next launch, which the driver API does not
   pass. `noted` returns the last launch; its parameters are 8 bytes each. */
#include <cuda.h>
#include <stdint.h>
#include <string.h>

#define MOST 128

struct launch {
  const char *name;
  unsigned grid, threads, shared, parameters;
  uint8_t values[MOST][8];
};

static struct launch last;
static unsigned sizes[MOST], expected;

void expect(unsigned count, const unsigned *of) {
  expected = count < MOST ? count : MOST;
  memcpy(sizes, of, expected * sizeof *sizes);
  memset(&last, 0, sizeof last);
}

const struct launch *noted(void) { return &last; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
  last.name = (const char *)function;
  last.grid = config->gridDimX * config->gridDimY * config->gridDimZ;
  last.threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  last.shared = config->sharedMemBytes;
  last.parameters = expected;
  for (unsigned i = 0; i < expected; i++)
    memcpy(last.values[i], parameters[i], sizes[i]);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)strdup(name);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 12080, CUDA_SUCCESS; }
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "", CUDA_SUCCESS; }

/* Linked by Triton's driver and not called for our kernels; their types do not matter. */
#define UNUSED(name)                            \
  CUresult unused_##name(void) __asm__(#name); \
  CUresult unused_##name(void) { return CUDA_ERROR_NOT_SUPPORTED; }
UNUSED(cuCtxGetLimit)
UNUSED(cuCtxSetCurrent)
UNUSED(cuCtxSetLimit)
UNUSED(cuDevicePrimaryCtxRetain)
UNUSED(cuFuncSetAttribute)
UNUSED(cuFuncSetCacheConfig)
UNUSED(cuModuleUnload)
UNUSED(cuOccupancyMaxActiveClusters)
UNUSED(cuStreamIsCapturing)
UNUSED(cuTensorMapEncodeTiled)
