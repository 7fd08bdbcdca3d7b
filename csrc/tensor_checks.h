// What the bindings of every compiled backend share: checks that name the argument at fault, and allocation.
// For *_binding.cpp only: it includes torch's stable headers.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <tuple>

namespace rk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor as_contiguous(const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The checks of one call: every tensor has the device of the first, and its dtype where nothing else is said.
// Failures are RuntimeErrors in Python.
class TensorChecks {
  public:
    // dtypes: what the backend supports, in the words of `served`.
    TensorChecks(const char* op, const Tensor& first, const char* name,
                 std::initializer_list<ScalarType> dtypes, const char* served)
        : op_(op), device_(first.device()), dtype_(first.scalar_type()), facts_(first) {
        bool known = false;
        for (const ScalarType dtype : dtypes) known = known || dtype == dtype_;
        STD_TORCH_CHECK(known, op_, ": ", name, " must be ", served, ", got ",
                        torch::headeronly::toString(dtype_));
    }

    const char* op() const { return op_; }
    ScalarType scalar_type() const { return dtype_; }

    void require(bool condition, const char* message) const {
        STD_TORCH_CHECK(condition, op_, ": ", message);
    }

    // Whether a tensor has the dtype and device of the first.
    bool is_same(const Tensor& t) const { return Facts(t) == facts_; }

    void same(const Tensor& t, const char* name, ScalarType dtype) const {
        STD_TORCH_CHECK(t.scalar_type() == dtype, op_, ": ", name, " must be ",
                        torch::headeronly::toString(dtype), ", got ",
                        torch::headeronly::toString(t.scalar_type()));
        STD_TORCH_CHECK(t.device() == device_, op_, ": ", name,
                        " must be on the device of the other tensors");
    }

    void vector(const Tensor& t, const char* name, int64_t size) const { vector(t, name, size, dtype_); }
    void vector(const Tensor& t, const char* name, int64_t size, ScalarType dtype) const {
        same(t, name, dtype);
        STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, op_, ": ", name, " must have shape [", size, "]");
    }

    void matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) const {
        matrix(t, name, rows, columns, dtype_);
    }
    void matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns, ScalarType dtype) const {
        same(t, name, dtype);
        STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, op_, ": ", name,
                        " must have shape [", rows, ", ", columns, "]");
    }

    // The address of the seed, or null without dropout.
    const int64_t* dropout_seed(double p, const std::optional<Tensor>& seed) const {
        STD_TORCH_CHECK(p >= 0.0 && p < 1.0, op_, ": dropout_p must be in [0, 1), got ", p);
        if (p == 0.0) return nullptr;
        STD_TORCH_CHECK(seed.has_value(), op_, ": dropout_p > 0 needs a seed");
        same(*seed, "seed", ScalarType::Long);
        STD_TORCH_CHECK(seed->numel() == 1, op_, ": seed must hold one element");
        return static_cast<const int64_t*>(seed->const_data_ptr());
    }

    // Uninitialised, contiguous, on the device of the call.
    Tensor empty(std::initializer_list<int64_t> sizes) const { return empty(sizes, dtype_); }
    Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
        int64_t strides[4];
        int64_t stride = 1;
        for (int i = static_cast<int>(sizes.size()) - 1; i >= 0; --i) {
            strides[i] = stride;
            stride *= sizes.begin()[i] > 0 ? sizes.begin()[i] : 1;
        }
        const int32_t code = code_of(dtype);
        AtenTensorHandle handle;
        TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                        strides, code, static_cast<int32_t>(device_.type()),
                                                        device_.is_cpu() ? 0 : device_.index(), &handle));
        return Tensor(handle);
    }

  private:
    // Dtype and device in torch's own numbers, which take no table to compare: the encoder asks hundreds of tensors.
    struct Facts {
        int32_t dtype = 0, device_type = 0, device_index = 0;
        explicit Facts(const Tensor& t) {
            TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
            TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
            TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
        }
        bool operator==(const Facts& other) const {
            return dtype == other.dtype && device_type == other.device_type &&
                   device_index == other.device_index;
        }
    };

    int32_t code_of(ScalarType dtype) const {
        switch (dtype) {
            case ScalarType::Float:
                return aoti_torch_dtype_float32();
            case ScalarType::BFloat16:
                return aoti_torch_dtype_bfloat16();
            case ScalarType::Half:
                return aoti_torch_dtype_float16();
            case ScalarType::Long:
                return aoti_torch_dtype_int64();
            case ScalarType::Int:
                return aoti_torch_dtype_int32();
            case ScalarType::Short:
                return aoti_torch_dtype_int16();
            case ScalarType::Byte:
                return aoti_torch_dtype_uint8();
            default:
                STD_TORCH_CHECK(false, op_, ": no tensor of ", torch::headeronly::toString(dtype),
                                " can be made here");
        }
    }
    const char* op_;
    torch::stable::Device device_;
    ScalarType dtype_;
    Facts facts_;
};

}  // namespace rk
