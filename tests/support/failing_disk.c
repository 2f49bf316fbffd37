/* A disk that fails: what is done below the folder FAILING_DISK_BELOW ends with the error that the file FAILING_DISK
   says, if it is one of the operations that are named there (a bit each, as in failing_disk.py). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CREATE = 1, WRITE = 2, SYNC = 4, RENAME = 8, UNLINK = 16, READ = 32 };

struct plan { volatile int error, what; };

static struct plan *plan(void) {
  static struct plan *found, none;
  if (!found) {
    const char *path = getenv("FAILING_DISK");
    int file = path ? syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0) : -1;
    if (file < 0) return &none;
    void *memory = mmap(NULL, sizeof none, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return &none;
    found = memory;
  }
  return found;
}

static int is_below(const char *path) {
  const char *folder = getenv("FAILING_DISK_BELOW");
  return folder && !strncmp(path, folder, strlen(folder));
}

static int is_open_below(int descriptor) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return is_below(path);
}

static int fails_at(int what, int folder, const char *path) {
  if (!(plan()->error && plan()->what & what)) return 0;
  if (!(*path == '/' ? is_below(path) : folder != AT_FDCWD && is_open_below(folder))) return 0;
  errno = plan()->error;
  return 1;
}

static int fails(int what, int descriptor) {
  if (!(plan()->error && plan()->what & what) || !is_open_below(descriptor)) return 0;
  errno = plan()->error;
  return 1;
}

#define NEXT(name, type, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                                \
  int name(const char *path, int flags, ...) {                                    \
    va_list rest;                                                                 \
    va_start(rest, flags);                                                        \
    mode_t mode = va_arg(rest, mode_t);                                           \
    va_end(rest);                                                                 \
    if (fails_at(flags & O_CREAT ? CREATE : READ, AT_FDCWD, path)) return -1;     \
    return NEXT(name, int, const char *, int, ...)(path, flags, mode);            \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                              \
  int name(int folder, const char *path, int flags, ...) {                        \
    va_list rest;                                                                 \
    va_start(rest, flags);                                                        \
    mode_t mode = va_arg(rest, mode_t);                                           \
    va_end(rest);                                                                 \
    if (fails_at(flags & O_CREAT ? CREATE : READ, folder, path)) return -1;       \
    return NEXT(name, int, int, const char *, int, ...)(folder, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *octets, size_t size) {
  return fails(WRITE, file) ? -1 : NEXT(write, ssize_t, int, const void *, size_t)(file, octets, size);
}

ssize_t read(int file, void *octets, size_t size) {
  return fails(READ, file) ? -1 : NEXT(read, ssize_t, int, void *, size_t)(file, octets, size);
}

int fsync(int file) { return fails(SYNC, file) ? -1 : NEXT(fsync, int, int)(file); }

int fdatasync(int file) { return fails(SYNC, file) ? -1 : NEXT(fdatasync, int, int)(file); }

int rename(const char *from, const char *to) {
  return fails_at(RENAME, AT_FDCWD, from) ? -1 : NEXT(rename, int, const char *, const char *)(from, to);
}

int renameat(int folder, const char *from, int target, const char *to) {
  if (fails_at(RENAME, folder, from)) return -1;
  return NEXT(renameat, int, int, const char *, int, const char *)(folder, from, target, to);
}

int unlink(const char *path) {
  return fails_at(UNLINK, AT_FDCWD, path) ? -1 : NEXT(unlink, int, const char *)(path);
}

int unlinkat(int folder, const char *path, int flags) {
  return fails_at(UNLINK, folder, path) ? -1 : NEXT(unlinkat, int, int, const char *, int)(folder, path, flags);
}
