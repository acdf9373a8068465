// What tch does not bind: backward passes written elsewhere, gradients against given output gradients, and the
// state of random generators. Every entry point catches: no C++ exception crosses into Rust, and the Rust
// callbacks return errors as strings, so no panic crosses into C++. The kernels in the other files allocate nothing but
// scratch and are `noexcept`: should there be no memory for it, the process ends.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

using torch::autograd::variable_list;

namespace {

// Grads in (null where undefined), grads out (null where none); null on success, else a malloc'ed message.
using BackwardFn = char* (*)(void* ctx, at::Tensor** grad_outputs, size_t num_outputs, at::Tensor** grad_inputs,
                             size_t num_inputs);
using DropFn = void (*)(void* ctx);

char* copy_message(const std::exception& error) { return strdup(error.what()); }

struct RustNode : public torch::autograd::Node {
  void* ctx;
  BackwardFn backward;
  DropFn drop;
  size_t num_inputs;

  RustNode(void* ctx, BackwardFn backward, DropFn drop, size_t num_inputs)
      : ctx(ctx), backward(backward), drop(drop), num_inputs(num_inputs) {}
  ~RustNode() override { release(); }

  std::string name() const override { return "RustBackward"; }
  void release_variables() override { release(); }

  variable_list apply(variable_list&& grads) override {
    TORCH_CHECK(ctx != nullptr, "backward ran a second time through a graph that was freed");
    std::vector<at::Tensor*> grad_outputs(grads.size(), nullptr);
    for (size_t i = 0; i < grads.size(); ++i)
      if (grads[i].defined()) grad_outputs[i] = &grads[i];
    std::vector<at::Tensor*> grad_inputs(num_inputs, nullptr);
    char* error = backward(ctx, grad_outputs.data(), grad_outputs.size(), grad_inputs.data(), num_inputs);
    variable_list result(num_inputs);
    for (size_t i = 0; i < num_inputs; ++i)
      if (grad_inputs[i] != nullptr) {
        result[i] = std::move(*grad_inputs[i]);
        delete grad_inputs[i];
      }
    if (error != nullptr) {
      std::string message(error);
      free(error);
      throw std::runtime_error(message);
    }
    return result;
  }

 private:
  void release() {
    if (ctx != nullptr) drop(ctx);
    ctx = nullptr;
  }
};

variable_list list(at::Tensor** tensors, size_t count) {
  variable_list out;
  out.reserve(count);
  for (size_t i = 0; i < count; ++i) out.push_back(*tensors[i]);
  return out;
}

}  // namespace

namespace {

// oneDNN keeps 1,024 compiled products by default. Batches without padding differ in length from step to step, so
// nearly all of them are never used again, and together they held several gigabytes after a hundred steps. It reads
// the variable when it compiles the first; a value that the user has set stands.
__attribute__((constructor)) void bound_primitive_cache() { setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32", 0); }

}  // namespace

extern "C" {

// Makes `outputs` depend on `inputs` through `backward`. Takes `ctx` over, whatever happens.
char* pt_attach_backward(at::Tensor** inputs, size_t num_inputs, at::Tensor** outputs, size_t num_outputs, void* ctx,
                         BackwardFn backward, DropFn drop) {
  try {
    // Owns ctx from here on.
    std::shared_ptr<RustNode> node(new RustNode(ctx, backward, drop, num_inputs), torch::autograd::deleteNode);
    variable_list in = list(inputs, num_inputs);
    if (!at::GradMode::is_enabled() || !torch::autograd::any_variable_requires_grad(in)) return nullptr;
    node->set_next_edges(torch::autograd::collect_next_edges(in));
    for (size_t i = 0; i < num_outputs; ++i) torch::autograd::create_gradient_edge(*outputs[i], node);
    return nullptr;
  } catch (const std::exception& error) {
    return copy_message(error);
  }
}

// Accumulates into .grad of every leaf: the vector-Jacobian product of `outputs` with `grad_outputs`.
char* pt_backward(at::Tensor** outputs, at::Tensor** grad_outputs, size_t count) {
  try {
    torch::autograd::backward(list(outputs, count), list(grad_outputs, count));
    return nullptr;
  } catch (const std::exception& error) {
    return copy_message(error);
  }
}

// One AdamW update of all tensors in one pass: libtorch's fused kernel. `step` counts from 1.
char* pt_fused_adamw(at::Tensor** parameters, at::Tensor** grads, at::Tensor** firsts, at::Tensor** seconds,
                     size_t count, double step, double lr, double beta1, double beta2, double weight_decay,
                     double eps) {
  try {
    at::NoGradGuard no_grad;
    variable_list values = list(parameters, count), steps;
    for (const at::Tensor& value : values)
      steps.push_back(at::full({}, step, at::TensorOptions().dtype(at::kFloat).device(value.device())));
    at::_fused_adamw_(values, list(grads, count), list(firsts, count), list(seconds, count), {}, steps, lr, beta1,
                      beta2, weight_decay, eps, false, false);
    // The kernel does not count as a write by itself, but copies in other formats are made anew by this count.
    for (const at::Tensor& value : values) value.unsafeGetTensorImpl()->bump_version();
    return nullptr;
  } catch (const std::exception& error) {
    return copy_message(error);
  }
}

// One AdamW update of `parameter` in place, as bitsandbytes' AdamW8bit does it between decoding the moments and encoding
// them again: its operations in its order (bitsandbytes 0.50.2, backends/cpu/ops.py). The moments are f32.
char* pt_adamw_8bit(at::Tensor* parameter, at::Tensor* grad, at::Tensor* first, at::Tensor* second, double step,
                    double lr, double beta1, double beta2, double weight_decay, double eps) {
  try {
    at::NoGradGuard no_grad;
    at::Tensor wide_grad = grad->to(at::kFloat), wide = parameter->to(at::kFloat);
    first->mul_(beta1).add_(wide_grad, 1.0 - beta1);
    second->mul_(beta2).addcmul_(wide_grad, wide_grad, 1.0 - beta2);
    double correction1 = 1.0 - std::pow(beta1, step), correction2 = std::sqrt(1.0 - std::pow(beta2, step));
    at::Tensor denominator = second->sqrt().div_(correction2).add_(eps);
    if (weight_decay > 0) wide.mul_(1.0 - lr * weight_decay);
    wide.addcdiv_(*first, denominator, -lr / correction1);
    if (!wide.is_same(*parameter)) parameter->copy_(wide);
    return nullptr;
  } catch (const std::exception& error) {
    return copy_message(error);
  }
}

// A tensor over memory of someone else's: u8 where `is_bytes`, else f32. Takes `owner` over, whatever happens, and drops
// it when nothing holds the tensor any more.
char* pt_tensor_over(void* data, const int64_t* size, size_t num_axes, int is_bytes, void* owner, DropFn drop,
                     at::Tensor** out) {
  try {
    std::shared_ptr<void> held(owner, drop);
    auto release = [held](void*) mutable { held.reset(); };
    auto options = at::TensorOptions().dtype(is_bytes ? at::kByte : at::kFloat);
    *out = new at::Tensor(at::from_blob(data, at::IntArrayRef(size, num_axes), release, options));
    return nullptr;
  } catch (const std::exception& error) {
    return copy_message(error);
  }
}

// Copies without waiting for a device that can do so; a copy to pinned memory has arrived once the device is done.
char* pt_copy_async(at::Tensor* target, at::Tensor* source) {
  try {
    at::NoGradGuard no_grad;
    target->copy_(*source, true);
    return nullptr;
  } catch (const std::exception& error) {
    return copy_message(error);
  }
}

// State of the default CPU generator as a new u8 tensor in *out.
char* pt_cpu_generator_state(at::Tensor** out) {
  try {
    auto generator = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(generator.mutex());
    *out = new at::Tensor(generator.get_state());
    return nullptr;
  } catch (const std::exception& error) {
    return copy_message(error);
  }
}

char* pt_set_cpu_generator_state(at::Tensor* state) {
  try {
    auto generator = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(*state);
    return nullptr;
  } catch (const std::exception& error) {
    return copy_message(error);
  }
}

// Calls `task(ctx)` `count` times on libtorch's threads; one after the other inside a task. `task` does not throw.
void pt_parallel(int64_t count, void (*task)(void*), void* ctx) noexcept {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(ctx);
  });
}

void pt_free_message(char* message) noexcept { free(message); }

}  // extern "C"
