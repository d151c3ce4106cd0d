# SPDX-License-Identifier: MIT
# Options that have few values, and flags that every target of ours gets.
foreach(choice EP_CUDA EP_MPI)
  if(NOT "${${choice}}" MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "${choice} is '${${choice}}'; it can be AUTO, ON or OFF")
  endif()
  if(${choice} STREQUAL "ON" AND NOT EP_SANITIZE STREQUAL "")
    message(FATAL_ERROR "${choice} is ON and EP_SANITIZE is '${EP_SANITIZE}'; with sanitizers it can be AUTO or OFF, and is left out")
  endif()
endforeach()

find_package(Threads REQUIRED)
include(CheckCCompilerFlag)

add_library(ep_options INTERFACE)
target_compile_definitions(ep_options INTERFACE _GNU_SOURCE)
target_include_directories(ep_options INTERFACE ${PROJECT_SOURCE_DIR}/include)
target_compile_options(ep_options INTERFACE
  -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith
  -Wvla -fno-strict-aliasing -ffp-contract=off)
target_link_libraries(ep_options INTERFACE Threads::Threads m ${CMAKE_DL_LIBS})

if(EP_SANITIZE STREQUAL "address")
  add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
  add_link_options(-fsanitize=address,undefined)
elseif(EP_SANITIZE STREQUAL "thread")
  add_compile_options(-fsanitize=thread -fno-omit-frame-pointer)
  add_link_options(-fsanitize=thread)
elseif(NOT EP_SANITIZE STREQUAL "")
  message(FATAL_ERROR "EP_SANITIZE is '${EP_SANITIZE}'; it can be address, thread or empty")
endif()

if(EP_LIBFUZZER)
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()

# A source named *_avx2.c or *_avx512.c is compiled for that instruction set and
# only called when the processor has it.
function(ep_simd_flags)
  foreach(source IN LISTS ARGN)
    if(source MATCHES "_avx2\\.c$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
    elseif(source MATCHES "_avx512\\.c$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS
        "-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mavx2;-mfma;-mf16c")
    endif()
  endforeach()
endfunction()
