// What the runtime calls an error code.
#include "../gpu.h"

namespace fastlora::gpu {

const char* error_text(int status) {
#if defined(FASTLORA_EMULATE_GPU)
    return status ? "failed" : "ok";
#elif defined(__HIP__)
    return hipGetErrorString((hipError_t)status);
#else
    return cudaGetErrorString((cudaError_t)status);
#endif
}

}  // namespace fastlora::gpu
