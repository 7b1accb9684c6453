# Cross-compiles with the clang of the ziglang wheel, against a glibc that every distribution since 2014 has.
# In the environment: MICROVLM_MACHINE, x86_64 or aarch64, and MICROVLM_ZIG_PYTHON, a Python that has ziglang.
set(machine $ENV{MICROVLM_MACHINE})
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR ${machine})
set(CMAKE_CXX_COMPILER
    $ENV{MICROVLM_ZIG_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/zig_cxx.py -target ${machine}-linux-gnu.2.17)
