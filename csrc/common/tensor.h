// The few things the registration layer needs to turn torch tensors into raw pointers. Python has
// already checked user input; the checks here guard against calling torch.ops.fastclust directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

namespace fastclust {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), name, " must have ", shape.size(),
                  " dimensions, got ", t.dim());
  int64_t i = 0;
  for (const int64_t size : shape) {  // -1: any size
    STD_TORCH_CHECK(size < 0 || t.size(i) == size, name, " must have size ", size,
                    " in dimension ", i, ", got ", t.size(i));
    ++i;
  }
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must have dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline bool is_beside(const Tensor& like, const Tensor& t) {
  return t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index();
}
inline bool is_beside(const Tensor& like, const std::optional<Tensor>& t) {
  return !t.has_value() || is_beside(like, *t);
}

// Kernels follow all pointers on the device of the tensor that the caller runs on, `like`. torch picks
// the backend by all tensors together, so that one on another device gets this far.
template <typename... Tensors>
void check_device(const Tensor& like, const Tensors&... others) {
  STD_TORCH_CHECK((is_beside(like, others) && ...), "all tensors must be on one device");
}

// Pointer to read, or nullptr for an absent optional tensor.
template <typename T>
const T* read_ptr(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}
template <typename T>
const T* read_ptr(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* write_ptr(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Uninitialised tensor on the device of `like`.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape,
                        ScalarType dtype) {
  return torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape) {
  return new_empty(like, shape, like.scalar_type());
}

}  // namespace fastclust
