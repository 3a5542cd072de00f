#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

/// The registered operators, called through the dispatcher. What they mean: schemas in ops.cpp.

namespace gradkern::bindings {

std::tuple<at::Tensor, at::Tensor> measure(at::TensorList grads);

std::tuple<at::Tensor, at::Tensor, at::Tensor> clip_(at::TensorList grads, double max_norm,
                                                     const std::optional<at::Tensor>& limit, double eps,
                                                     double clip_value, std::string_view nonfinite);

void apply_(at::TensorList grads, const std::optional<at::Tensor>& rows, const at::Tensor& coef,
            double clip_value, std::string_view nonfinite);

/// The total of rows `[tensors, kColumns]`, in the bits that `measure` gives it.
at::Tensor fold_rows(const at::Tensor& rows);

/// The yardsticks of the benchmark. Sum of squares alone, as precisely as `measure` takes it; and a read
/// of every byte that computes nothing, which is the most that memory allows.
double measure_sum_sq(at::TensorList grads);
int64_t read_pass(const at::Tensor& tensor);

}  // namespace gradkern::bindings
