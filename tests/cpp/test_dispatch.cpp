#include <cstdlib>
#include <string>

#include "check.h"
#include "cpu/kernels.h"

using namespace gradkern;

namespace {

std::vector<std::string> offered() {
  const cpu::Kernels* sets[cpu::kMaxSets];
  const int count = cpu::available(sets);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(sets[i]->isa);
  return names;
}

// First, before anything is selected. ctest runs this program with several values of the variable.
TEST(the_variable_chooses_the_set_and_a_wrong_one_is_reported) {
  const char* asked = getenv("GRADKERN_ISA");
  bool known = false;
  for (const std::string& name : offered()) known = known || (asked != nullptr && name == asked);
  CHECK_EQUAL(std::string(cpu::kernels().isa), known ? std::string(asked) : offered().front());
  CHECK_EQUAL(cpu::selection_problem() != nullptr, asked != nullptr && !known);
}

TEST(the_portable_set_is_always_offered_and_last) { CHECK_EQUAL(offered().back(), std::string("portable")); }

TEST(every_set_that_is_offered_can_be_selected) {
  for (const std::string& name : offered()) {
    CHECK(cpu::select(name.c_str()));
    CHECK_EQUAL(std::string(cpu::kernels().isa), name);
  }
}

TEST(an_unknown_set_is_refused_and_nothing_changes) {
  const std::string before = cpu::kernels().isa;
  CHECK(!cpu::select("no-such-set"));
  CHECK_EQUAL(std::string(cpu::kernels().isa), before);
}

}  // namespace
