#pragma once

#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

/// As much of a test framework as these tests need, so that building them needs nothing but a compiler.
/// Each test is a program; a failed check is reported, the rest of the test still runs.

namespace check {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline void fail(const char* file, int line, const std::string& what) {
  // One broken kernel fails a check for each of thousands of elements: the first few say it all.
  constexpr int kReported = 20;
  if (++failures() <= kReported) fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

template <class A, class B>
std::string both(const char* text, const A& a, const B& b, const std::string& context) {
  std::ostringstream out;
  out.precision(17);
  out << text << ": " << a << " against " << b;
  if (!context.empty()) out << " [" << context << "]";
  return out.str();
}

}  // namespace check

#define TEST(name)                                           \
  static void name();                                        \
  static const check::Register register_##name{#name, name}; \
  static void name()

#define CHECK(condition)                                           \
  do {                                                             \
    if (!(condition)) check::fail(__FILE__, __LINE__, #condition); \
  } while (false)

/// Compares, and prints both sides and `context` (a std::string) if they differ.
#define CHECK_EQUAL_IN(context, a, b)                                                             \
  do {                                                                                            \
    const auto a_ = (a);                                                                          \
    const auto b_ = (b);                                                                          \
    if (!(a_ == b_)) check::fail(__FILE__, __LINE__, check::both(#a " == " #b, a_, b_, context)); \
  } while (false)

#define CHECK_EQUAL(a, b) CHECK_EQUAL_IN(std::string(), a, b)

int main() {
  for (const check::Test& test : check::tests()) {
    const int before = check::failures();
    test.body();
    printf("%s %s\n", check::failures() == before ? "ok    " : "FAILED", test.name);
  }
  if (check::tests().empty()) fprintf(stderr, "no tests\n");
  return check::failures() == 0 && !check::tests().empty() ? 0 : 1;
}
