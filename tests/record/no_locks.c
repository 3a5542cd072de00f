/* Loaded before libc: a file system on which locks fail, of the files whose name ends in $GRADKERN_NO_LOCKS,
   as they do on Lustre mounted without them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(int file, int command) {
  if (command != F_SETLK && command != F_SETLKW && command != F_GETLK) return 0;
  char link[64], name[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, name, sizeof name - 1);
  const char* ending = getenv("GRADKERN_NO_LOCKS");
  if (length < 0 || ending == NULL) return 0;
  name[length] = 0;
  size_t wanted = strlen(ending);
  return (size_t)length >= wanted && strcmp(name + length - wanted, ending) == 0;
}

static int forward(const char* symbol, int file, int command, void* argument) {
  if (fails(file, command)) {
    errno = ENOLCK;
    return -1;
  }
  int (*next)(int, int, ...) = (int (*)(int, int, ...))dlsym(RTLD_NEXT, symbol);
  return next(file, command, argument);
}

#define FORWARD(symbol)                               \
  int symbol(int file, int command, ...) {            \
    va_list arguments;                                \
    va_start(arguments, command);                     \
    void* argument = va_arg(arguments, void*);        \
    va_end(arguments);                                \
    return forward(#symbol, file, command, argument); \
  }

FORWARD(fcntl)
FORWARD(fcntl64)
