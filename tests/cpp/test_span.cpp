#include "core/span.h"

#include "check.h"
#include "data.h"

namespace {

TEST(an_element_is_as_many_bytes_as_its_dtype) {
  for (const gradkern::DType dtype : data::kDTypes) {
    CHECK_EQUAL_IN(data::name(dtype), gradkern::element_bytes(dtype), data::bytes(dtype));
  }
}

}  // namespace
