# SPDX-License-Identifier: MIT
# The Python packages: what a wheel contains of the build, and their tests.
if(SKBUILD)
  install(FILES $<TARGET_FILE:entrepot> DESTINATION entrepot RENAME libentrepot.so COMPONENT python)
  if(TARGET entrepot_cuda) # the library looks for it beside itself
    install(FILES $<TARGET_FILE:entrepot_cuda> DESTINATION entrepot RENAME libentrepot_cuda.so
      COMPONENT python)
  endif()
endif()

# pytest runs with the interpreter of tools/python_env.sh, on this build's library; not with
# sanitizers, which would have to be in the interpreter too.
set(EP_PYTHON ${PROJECT_SOURCE_DIR}/build/python/bin/python CACHE FILEPATH
    "Python with numpy, ml_dtypes and pytest, for the tests of bindings/python")
if(EP_BUILD_TESTS AND EXISTS ${EP_PYTHON} AND NOT EP_SANITIZE)
  add_test(NAME python_test COMMAND ${EP_PYTHON} -m pytest -q -p no:cacheprovider
           ${PROJECT_SOURCE_DIR}/bindings/python/tests)
  set_tests_properties(python_test PROPERTIES LABELS "python;plain" TIMEOUT 600 PROCESSORS 2
    ENVIRONMENT "EP_LIBRARY=$<TARGET_FILE:entrepot>;PYTHONDONTWRITEBYTECODE=1")
endif()
