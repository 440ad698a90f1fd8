// For the host kernels: the element type of a template instance, by its name.
#pragma once
#include "host_runtime.h"
#include "numeric.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace host {

// Calls body(Bf16{}) or body(Half{}), whichever the kernel's template arguments name.
template <class Body>
void with_type(const Launch& launch, Body body) {
    if (launch.has("__nv_bfloat16")) body(Bf16{});
    else if (launch.has("half")) body(Half{});
    else die("%s: neither bfloat16 nor half", launch.name.c_str());
}

// The template instance must be the one that this code was written for.
inline void require(bool holds, const Launch& launch, const char* what) {
    if (!holds) die("%s: %s is not supported", launch.name.c_str(), what);
}

}  // namespace host
