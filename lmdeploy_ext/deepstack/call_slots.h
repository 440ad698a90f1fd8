// Takes over the calls that a loaded module makes to some of its own exported functions.
//
// A module calls such a function through a table of addresses (the "global offset table"), as
// position-independent code does for every symbol that another library might replace. `take_calls` finds
// the entries through the module's dynamic section and replaces them, `restore_calls` puts them back. The
// module's code and classes are not changed. Needs libc and libdl.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
enum { CALL_SLOT = R_X86_64_JUMP_SLOT, ADDRESS_SLOT = R_X86_64_GLOB_DAT };
#elif defined(__aarch64__)
enum { CALL_SLOT = R_AARCH64_JUMP_SLOT, ADDRESS_SLOT = R_AARCH64_GLOB_DAT };
#else
#error "unknown processor"
#endif

typedef void Function(void);

enum { MOST_SLOTS = 16 };

// A function of the module. `original` is found by `check_calls`; calls may come while it looks again.
struct Hooked {
    const char *symbol;
    Function *replacement;
    _Atomic(Function *) original;
    Function **slots[MOST_SLOTS];
    int slot_count;
};

static inline Function *original_of(struct Hooked *one) {
    return atomic_load_explicit(&one->original, memory_order_relaxed);
}

static char problem[512];

#define FAIL(...) return snprintf(problem, sizeof problem, __VA_ARGS__), problem

struct Module {
    const struct link_map *map;
    const ElfW(Sym) *symbols;
    const char *names;
    const ElfW(Rela) *tables[2];
    size_t counts[2];
    uintptr_t sealed_begin, sealed_end;  // read-only after relocation
};

static int find_sealed(struct dl_phdr_info *info, size_t size, void *argument) {
    struct Module *module = argument;
    (void)size;
    if (info->dlpi_addr != module->map->l_addr) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr) *header = &info->dlpi_phdr[i];
        if (header->p_type != PT_GNU_RELRO) continue;
        module->sealed_begin = info->dlpi_addr + header->p_vaddr;
        module->sealed_end = module->sealed_begin + header->p_memsz;
    }
    return 1;
}

static struct Module read_module(const struct link_map *map) {
    struct Module module = {.map = map};
    for (const ElfW(Dyn) *entry = map->l_ld; entry->d_tag != DT_NULL; ++entry) {
        const uintptr_t value = entry->d_un.d_val;
        const uintptr_t address = value < map->l_addr ? value + map->l_addr : value;  // glibc has added l_addr
        switch (entry->d_tag) {
            case DT_SYMTAB: module.symbols = (const ElfW(Sym) *)address; break;
            case DT_STRTAB: module.names = (const char *)address; break;
            case DT_JMPREL: module.tables[0] = (const ElfW(Rela) *)address; break;
            case DT_PLTRELSZ: module.counts[0] = value / sizeof(ElfW(Rela)); break;
            case DT_RELA: module.tables[1] = (const ElfW(Rela) *)address; break;
            case DT_RELASZ: module.counts[1] = value / sizeof(ElfW(Rela)); break;
        }
    }
    dl_iterate_phdr(find_sealed, &module);
    return module;
}

static void find_slots(const struct Module *module, struct Hooked *hooked, int count) {
    for (int f = 0; f < count; ++f) hooked[f].slot_count = 0;
    for (int table = 0; table < 2; ++table) {
        for (size_t i = 0; i < module->counts[table]; ++i) {
            const ElfW(Rela) *relocation = &module->tables[table][i];
            const unsigned type = ELF64_R_TYPE(relocation->r_info);
            if (type != CALL_SLOT && type != ADDRESS_SLOT) continue;
            const char *name = module->names + module->symbols[ELF64_R_SYM(relocation->r_info)].st_name;
            for (int f = 0; f < count; ++f)
                if (hooked[f].slot_count < MOST_SLOTS && !strcmp(name, hooked[f].symbol))
                    hooked[f].slots[hooked[f].slot_count++] =
                        (Function **)(module->map->l_addr + relocation->r_offset);
        }
    }
}

// The file of the library that contains an address, or NULL.
static const char *home(Function *address, uintptr_t *base) {
    Dl_info info;
    *base = 0;
    if (!dladdr((void *)(uintptr_t)address, &info)) return NULL;
    *base = (uintptr_t)info.dli_fbase;
    return info.dli_fname;
}

static const char *check_function(const struct Module *module, void *handle, struct Hooked *one) {
    const char *symbol = one->symbol;
    const uintptr_t base = module->map->l_addr;
    uintptr_t found = 0;
    Function *const function = (Function *)(uintptr_t)dlsym(handle, symbol);
    if (!function) FAIL("it has no function %s", symbol);
    atomic_store_explicit(&one->original, function, memory_order_relaxed);
    if (!home(function, &found) || found != base) FAIL("%s belongs to another library", symbol);
    if (!one->slot_count) FAIL("it calls %s directly, so that the call cannot be taken over", symbol);
    for (int s = 0; s < one->slot_count; ++s) {
        const uintptr_t slot = (uintptr_t)one->slots[s];
        if (slot >= module->sealed_begin && slot < module->sealed_end)
            FAIL("its table of calls is read-only (%s)", symbol);
        const char *name = home(*one->slots[s], &found);
        // An unbound slot also points into the module.
        if (*one->slots[s] != one->replacement && found != base)
            FAIL("%s is already taken over by %s", symbol, name ? name : "something unknown");
    }
    return NULL;
}

// Checks a loaded module, given its path, and changes nothing. Returns NULL, or the problem.
static const char *check_calls(const char *path, struct Hooked *hooked, int count) {
    void *handle = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
    if (!handle) FAIL("%s is not loaded", path);
    struct link_map *map = NULL;
    const char *wrong = NULL;
    if (dlinfo(handle, RTLD_DI_LINKMAP, &map)) wrong = "its dynamic section cannot be read";
    if (!wrong) {
        const struct Module module = read_module(map);
        find_slots(&module, hooked, count);
        for (int f = 0; !wrong && f < count; ++f) wrong = check_function(&module, handle, &hooked[f]);
    }
    dlclose(handle);
    return wrong;
}

// Takes over the calls of a loaded module. Returns NULL, or the problem; then nothing is changed.
static const char *take_calls(const char *path, struct Hooked *hooked, int count) {
    const char *wrong = check_calls(path, hooked, count);
    if (wrong) return wrong;
    for (int f = 0; f < count; ++f)
        for (int s = 0; s < hooked[f].slot_count; ++s)
            __atomic_store_n(hooked[f].slots[s], hooked[f].replacement, __ATOMIC_RELEASE);
    return NULL;
}

// The number of the module's call slots that point to this library; 0 if it is not attached, or if
// another library has replaced a slot.
static int bound_calls(const struct Hooked *hooked, int count) {
    int bound = 0;
    for (int f = 0; f < count; ++f) {
        for (int s = 0; s < hooked[f].slot_count; ++s) {
            if (*hooked[f].slots[s] != hooked[f].replacement) return 0;
            ++bound;
        }
    }
    return bound;
}

// Restores the slots that still point to this library.
static void restore_calls(struct Hooked *hooked, int count) {
    for (int f = 0; f < count; ++f)
        for (int s = 0; s < hooked[f].slot_count; ++s)
            if (*hooked[f].slots[s] == hooked[f].replacement)
                __atomic_store_n(hooked[f].slots[s], original_of(&hooked[f]), __ATOMIC_RELEASE);
}
