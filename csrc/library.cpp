// Every operator schema of fastclust, in one place. Implementations register themselves from
// csrc/<op>/<op>_ops.cpp (CPU) and csrc/<op>/<op>_cuda_ops.cu (CUDA); shape functions and autograd
// live in fastclust/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastclust, m) {
  (void)m;
}
