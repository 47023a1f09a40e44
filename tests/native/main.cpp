// main [--guard-pages] [suite ...]
#include "native/harness.h"

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  std::vector<std::string> wanted;
  for (const auto& argument : arguments) {
    if (argument == "--guard-pages") {
      native::guard_pages = true;
    } else {
      wanted.push_back(argument);
    }
  }
  for (const native::Suite& suite : native::suites()) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), suite.name) == wanted.end()) {
      continue;
    }
    const int before = native::n_passed;
    suite.run();
    std::printf("%s: %d checks passed\n", suite.name, native::n_passed - before);
  }
  if (native::n_failed > 0) std::printf("%d checks failed\n", native::n_failed);
  return native::n_failed > 0 || native::n_passed == 0;
}
