# Every test of the tree. Files are found by their names, so that a new test needs no line here:
#   tests/unit/test_*.c      one program and one ctest each                         label unit
#   tests/support/*.c        linked into all of them; a file with a main() is a program of its own, build/tests/NAME
#   tests/fuzz/fuzz_*.c      one program each with tests/fuzz/driver.c (MOEC_FUZZ)   label fuzz
#   tests/cli/test_*.sh      run with the program's path                            label cli
#   tests/check_*.cmake      rules about the source                                 label layers
find_package(PkgConfig REQUIRED)
pkg_check_modules(CMOCKA REQUIRED IMPORTED_TARGET cmocka)

set(MOEC_ASAN_OPTIONS "detect_leaks=1:allocator_may_return_null=1" CACHE STRING "ASAN_OPTIONS of the tests")
set(moec_test_env "ASAN_OPTIONS=${MOEC_ASAN_OPTIONS}" "UBSAN_OPTIONS=print_stacktrace=1" "OPENBLAS_NUM_THREADS=1"
    "LSAN_OPTIONS=suppressions=${CMAKE_CURRENT_SOURCE_DIR}/tests/lsan.supp:print_suppressions=0" "OMP_WAIT_POLICY=passive" "MOEC_SANITIZED=${MOEC_SANITIZE}")

# --- support ----------------------------------------------------------------------------------------------------------
file(GLOB support_sources CONFIGURE_DEPENDS tests/support/*.c)
set(support_library)
foreach(source ${support_sources})
    file(STRINGS ${source} main_line REGEX "^int main\\(" LIMIT_COUNT 1)
    if(main_line)
        get_filename_component(name ${source} NAME_WE)
        add_executable(support_${name} ${source})
        set_target_properties(support_${name} PROPERTIES OUTPUT_NAME ${name}
            RUNTIME_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/tests)
        list(APPEND support_programs support_${name})
    else()
        list(APPEND support_library ${source})
    endif()
endforeach()
add_library(moec_support INTERFACE)
if(support_library)
    add_library(moec_support_objects STATIC ${support_library})
    target_link_libraries(moec_support_objects PRIVATE moec_flags moecompress_lib PkgConfig::CMOCKA)
    target_compile_definitions(moec_support_objects PRIVATE MOEC_SOURCE_DIR="${CMAKE_CURRENT_SOURCE_DIR}")
    target_link_libraries(moec_support INTERFACE moec_support_objects)
endif()
target_include_directories(moec_support INTERFACE tests tests/support)
target_compile_definitions(moec_support INTERFACE MOEC_SOURCE_DIR="${CMAKE_CURRENT_SOURCE_DIR}")
target_link_libraries(moec_support INTERFACE moec_flags moecompress_lib)
foreach(program ${support_programs})
    target_link_libraries(${program} PRIVATE moec_support)
endforeach()

# --- unit -------------------------------------------------------------------------------------------------------------
file(GLOB unit_sources CONFIGURE_DEPENDS tests/unit/test_*.c)
foreach(source ${unit_sources})
    get_filename_component(name ${source} NAME_WE)
    add_executable(${name} ${source})
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/tests)
    target_link_libraries(${name} PRIVATE moec_support PkgConfig::CMOCKA)
    add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/tests)
    set_tests_properties(${name} PROPERTIES LABELS unit TIMEOUT 600 ENVIRONMENT "${moec_test_env}")
endforeach()

# --- fuzz -------------------------------------------------------------------------------------------------------------
if(MOEC_FUZZ)
    file(GLOB fuzz_sources CONFIGURE_DEPENDS tests/fuzz/fuzz_*.c)
    foreach(source ${fuzz_sources})
        get_filename_component(name ${source} NAME_WE)
        string(REPLACE "fuzz_" "" corpus ${name})
        add_executable(${name} ${source} tests/fuzz/driver.c)
        set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/tests)
        target_link_libraries(${name} PRIVATE moec_support)
        add_test(NAME ${name} COMMAND ${name} --seconds ${MOEC_FUZZ_SECONDS} --seed 1
            --save ${CMAKE_CURRENT_BINARY_DIR}/tests/${name}.input ${CMAKE_CURRENT_SOURCE_DIR}/tests/fuzz/corpus/${corpus})
        math(EXPR limit "${MOEC_FUZZ_SECONDS} + 120")
        set_tests_properties(${name} PROPERTIES LABELS fuzz TIMEOUT ${limit} ENVIRONMENT "${moec_test_env}")
    endforeach()
endif()

# --- the command line -------------------------------------------------------------------------------------------------
file(GLOB cli_tests CONFIGURE_DEPENDS tests/cli/test_*.sh)
if(TARGET moecompress)
    foreach(script ${cli_tests})
        get_filename_component(name ${script} NAME_WE)
        add_test(NAME cli_${name} COMMAND sh ${script} $<TARGET_FILE:moecompress> ${CMAKE_CURRENT_SOURCE_DIR}
            WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR})
        set_tests_properties(cli_${name} PROPERTIES LABELS cli TIMEOUT 900 SKIP_RETURN_CODE 77 COST 10 # the longest first
            ENVIRONMENT "${moec_test_env}")
    endforeach()
endif()

# --- rules about the source -------------------------------------------------------------------------------------------
add_test(NAME check_layers COMMAND ${CMAKE_COMMAND} -DROOT=${CMAKE_CURRENT_SOURCE_DIR}
    -P ${CMAKE_CURRENT_SOURCE_DIR}/tests/check_layers.cmake)
add_test(NAME check_headers COMMAND ${CMAKE_COMMAND} -DROOT=${CMAKE_CURRENT_SOURCE_DIR} -DCC=${CMAKE_C_COMPILER}
    -P ${CMAKE_CURRENT_SOURCE_DIR}/tests/check_headers.cmake)
set_tests_properties(check_layers check_headers PROPERTIES LABELS layers TIMEOUT 120)
