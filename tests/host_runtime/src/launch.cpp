// Kernels are registered with their device name when the module is loaded; a launch finds its name
// by the address of the host stub and runs what was registered here for it.
#include "host_runtime.h"

#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace host {
namespace {

struct Entry {
    const char* mangled;
    bool resolved = false;
    std::string name;
    const Kernel* kernel = nullptr;
};

struct Table {
    std::mutex mutex;
    std::unordered_map<const void*, Entry> entries;
    std::vector<Kernel> kernels;
    FILE* trace = nullptr;
    bool trace_open = false;
};

Table& table() {
    static Table* value = new Table;
    return *value;
}

// The number of parameters in "(a, b<c, d>, (e))", which begins at `open`.
int count_parameters(const std::string& text, size_t open) {
    if (text[open + 1] == ')') return 0;
    int depth = 0, count = 1;
    for (size_t i = open; i < text.size(); ++i) {
        if (std::strchr("(<{", text[i])) ++depth;
        if (std::strchr(")>}", text[i])) --depth;
        if (text[i] == ',' && depth == 1) ++count;
    }
    return count;
}

// "void ns::name<args>(parameters)" -> "ns::name<args>" and the number of parameters
std::string plain_name(const char* mangled, int* parameters) {
    *parameters = kAny;
    int status = 0;
    std::unique_ptr<char, decltype(&std::free)> text(abi::__cxa_demangle(mangled, nullptr, nullptr, &status), std::free);
    if (status != 0) return mangled;
    std::string s = text.get();
    if (s.rfind("void ", 0) == 0) s.erase(0, 5);
    if (!s.empty() && s.back() == ')') {  // cut the parameter list, which has parentheses of its own
        int depth = 0;
        for (size_t i = s.size(); i-- > 0;) {
            if (s[i] == ')') ++depth;
            if (s[i] == '(' && --depth == 0) {
                *parameters = count_parameters(s, i);
                s.resize(i);
                break;
            }
        }
    }
    return s;
}

const Kernel* find(const std::vector<Kernel>& kernels, const std::string& name) {
    std::string base = name.substr(0, name.find('<'));
    if (const size_t at = base.find("::CUB_"); at != std::string::npos)  // cub names a version and processors
        base.erase(at, base.find("_NS::", at) + 3 - at);
    for (const Kernel& kernel : kernels) {
        const std::string prefix = kernel.prefix;  // with '<' it names one instance of a template
        if (prefix == base || (prefix.find('<') != std::string::npos && name.rfind(prefix, 0) == 0)) return &kernel;
    }
    return nullptr;
}

FILE* trace(Table& t) {
    if (!t.trace_open) {
        t.trace_open = true;
        const char* path = std::getenv("HOST_RUNTIME_TRACE");
        if (path && *path) t.trace = std::strcmp(path, "-") ? std::fopen(path, "a") : stderr;
    }
    return t.trace;
}

Entry& resolve(const void* function, const dim3& grid, const dim3& block) {
    Table& t = table();
    std::lock_guard<std::mutex> lock(t.mutex);
    const auto it = t.entries.find(function);
    if (it == t.entries.end()) die("a launch of a function that was never registered: %p", function);
    Entry& entry = it->second;
    if (!entry.resolved) {
        int parameters;
        entry.name = plain_name(entry.mangled, &parameters);
        entry.kernel = find(t.kernels, entry.name);
        if (entry.kernel && entry.kernel->parameters != kAny && entry.kernel->parameters != parameters)
            die("%s has %d parameters, its host code knows %d", entry.name.c_str(), parameters, entry.kernel->parameters);
        entry.resolved = true;
    }
    if (FILE* out = trace(t)) {
        std::fprintf(out, "launch %s grid %u,%u,%u block %u,%u,%u\n", entry.name.c_str(), grid.x, grid.y, grid.z, block.x, block.y, block.z);
        std::fflush(out);
    }
    return entry;
}

void run(const void* function, dim3 grid, dim3 block, size_t shared_bytes, void** arguments) {
    const Entry& entry = resolve(function, grid, block);
    const bool numbers = settings().mode == Mode::Numbers;
    if (!entry.kernel) {
        if (numbers) die("no host kernel for %s [%s]", entry.name.c_str(), entry.mangled);
        return;
    }
    if (numbers || entry.kernel->state) entry.kernel->run(Launch{entry.name, grid, block, shared_bytes, arguments});
}

// <<<grid, block>>> pushes its configuration, and the stub of the kernel pops it on the same thread.
struct Configuration {
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

}  // namespace

Register::Register(std::vector<Kernel> kernels) {
    auto& all = table().kernels;
    all.insert(all.end(), kernels.begin(), kernels.end());
}

}  // namespace host

extern "C" {

void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    host::Table& t = host::table();
    std::lock_guard<std::mutex> lock(t.mutex);
    t.entries[stub].mangled = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
    host::configurations.push_back({grid, block, shared_bytes, stream});
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
    const host::Configuration c = host::configurations.back();
    host::configurations.pop_back();
    *grid = c.grid, *block = c.block, *shared_bytes = c.shared_bytes;
    *static_cast<cudaStream_t*>(stream) = c.stream;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t) {
    host::run(function, grid, block, shared_bytes, arguments);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void** arguments) {
    host::run(function, c->gridDim, c->blockDim, c->dynamicSmemBytes, arguments);
    return cudaSuccess;
}

}  // extern "C"
