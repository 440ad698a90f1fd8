// The element types of TurboMind as plain structs that convert to and from float, rounding to nearest even.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace host {

struct Bf16 {
    uint16_t bits;
    Bf16() = default;
    Bf16(float value) {
        uint32_t u;
        std::memcpy(&u, &value, 4);
        if ((u & 0x7fffffffu) > 0x7f800000u) bits = uint16_t(u >> 16 | 0x40);  // NaN stays NaN
        else bits = uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
    }
    operator float() const {
        const uint32_t u = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &u, 4);
        return value;
    }
};

struct Half {
    uint16_t bits;
    Half() = default;
#ifdef __F16C__
    Half(float value) : bits(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)) {}
    operator float() const { return _cvtsh_ss(bits); }
#else
    Half(float value) {
        uint32_t u;
        std::memcpy(&u, &value, 4);
        const uint16_t sign = uint16_t(u >> 16 & 0x8000);
        u &= 0x7fffffffu;
        if (u > 0x7f800000u) bits = sign | 0x7e00;        // NaN
        else if (u >= 0x477ff000u) bits = sign | 0x7c00;  // too large, or infinite
        else if (u < 0x38800000u) {                       // subnormal: let the addition round
            float shifted;
            std::memcpy(&shifted, &u, 4);
            shifted += 0.5f;
            std::memcpy(&u, &shifted, 4);
            bits = sign | uint16_t(u - 0x3f000000u);
        } else bits = sign | uint16_t((u - 0x38000000u + 0xfffu + (u >> 13 & 1)) >> 13);
    }
    operator float() const {
        const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
        uint32_t u;
        float value;
        if (rest >= 0x7c00) u = sign | 0x7f800000u | (rest & 0x3ff) << 13;
        else if (rest >= 0x400) u = sign | ((rest << 13) + 0x38000000u);
        else {
            value = float(rest) * 0x1p-24f;
            std::memcpy(&u, &value, 4);
            u |= sign;
        }
        std::memcpy(&value, &u, 4);
        return value;
    }
#endif
};

static_assert(sizeof(Bf16) == 2 && sizeof(Half) == 2, "as on the device");

}  // namespace host
