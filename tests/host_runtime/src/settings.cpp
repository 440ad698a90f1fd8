#include "host_runtime.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace host {
namespace {

long number(const char* name, long otherwise) {
    const char* text = std::getenv(name);
    return text && *text ? std::strtol(text, nullptr, 10) : otherwise;
}

Settings read() {
    const char* mode = std::getenv("HOST_RUNTIME_MODE");
    Settings s{};
    if (!mode || !std::strcmp(mode, "null")) s.mode = Mode::Null;
    else if (!std::strcmp(mode, "numbers")) s.mode = Mode::Numbers;
    else die("HOST_RUNTIME_MODE is '%s'; it is null or numbers", mode);
    s.memory_bytes = size_t(number("HOST_RUNTIME_MEMORY_MIB", 2048)) << 20;
    s.null_token = int(number("HOST_RUNTIME_NULL_TOKEN", 7));
    s.poison = number("HOST_RUNTIME_POISON", 0) != 0;
    s.masks = std::getenv("HOST_RUNTIME_MASKS");
    s.capability = int(number("HOST_RUNTIME_CAPABILITY", 90));
    if (s.capability < 70 || s.capability > 129) die("HOST_RUNTIME_CAPABILITY is %d; it is 70 to 129", s.capability);
    s.delay_us = unsigned(number("HOST_RUNTIME_DELAY_US", 0));
    return s;
}

}  // namespace

const Settings& settings() {
    static const Settings value = read();
    return value;
}

void die(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::fputs("[host-runtime] ", stderr);
    std::vfprintf(stderr, format, arguments);
    std::fputc('\n', stderr);
    va_end(arguments);
    std::fflush(stderr);
    std::abort();
}

}  // namespace host
