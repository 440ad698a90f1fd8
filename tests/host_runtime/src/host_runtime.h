// What the parts of the host runtime share: device memory, settings, and kernels by name.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace host {

// ---- settings, from the environment, read once -------------------------------------------------

enum class Mode { Null, Numbers };

struct Settings {
    Mode mode;             // HOST_RUNTIME_MODE: null | numbers
    size_t memory_bytes;   // HOST_RUNTIME_MEMORY_MIB: device memory that the runtime reports
    int null_token;        // HOST_RUNTIME_NULL_TOKEN: what sampling chooses in null mode
    bool poison;           // HOST_RUNTIME_POISON=1: new device memory is filled with NaN patterns
    unsigned delay_us;     // HOST_RUNTIME_DELAY_US: sleep at each sampling, so that a test can come in between
    int capability;        // HOST_RUNTIME_CAPABILITY: compute capability of the device times ten: 90
    const char* masks;     // HOST_RUNTIME_MASKS: a file that gets the masks of grammars
};
const Settings& settings();

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- device memory (memory.cpp) ------------------------------------------------------------------

// Whether [pointer, pointer + bytes) lies within one live allocation.
bool is_allocated(const void* pointer, size_t bytes);

// ---- launches (launch.cpp) -----------------------------------------------------------------------

struct Launch {
    const std::string& name;  // demangled, without return type and parameter list
    dim3 grid, block;
    size_t shared_bytes;
    void** arguments;

    template <class T>
    T arg(int index) const { return *static_cast<T*>(arguments[index]); }

    // A pointer argument that must be device memory with room for `count` elements.
    template <class T>
    T* array(int index, size_t count, const char* what) const {
        T* pointer = arg<T*>(index);
        if (count && !is_allocated(pointer, count * sizeof(T)))
            die("%s: %s (%p, %zu bytes) is not device memory", name.c_str(), what, (const void*)pointer, count * sizeof(T));
        return pointer;
    }
    bool has(const char* text) const { return name.find(text) != std::string::npos; }
};

using Handler = void (*)(const Launch&);

// One kernel of TurboMind computed here. `prefix` is compared with the demangled name up to its template arguments;
// `parameters` is the number that this code knows, and a kernel with another number is refused: it has changed.
// State kernels also run in null mode: without them no request ever ends.
constexpr int kAny = -1;  // for kernels that do nothing here
struct Kernel {
    const char* prefix;
    Handler run;
    int parameters;
    bool state = false;
};

struct Register {
    explicit Register(std::vector<Kernel> kernels);
};

}  // namespace host
