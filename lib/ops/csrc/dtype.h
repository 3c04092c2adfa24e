// The floating types that operators know, where torch's own names are out of reach.
#pragma once

namespace detectron {

enum class DType { f32, f64, f16, bf16 };

}  // namespace detectron
