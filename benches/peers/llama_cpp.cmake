# Read by CMake right after llama-cpp-python's `project()`. Its CMakeLists forces the helper library `common` on in the
# cache; an ordinary variable hides that, and `common` (chat parsers, a web client) stays unbuilt: no peer calls it.
set(LLAMA_BUILD_COMMON OFF)
