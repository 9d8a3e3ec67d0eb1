# Every header compiles alone:  cmake -DROOT=<repository> -DCC=<compiler> -P tests/check_headers.cmake
cmake_policy(VERSION 3.22)
file(GLOB headers ${ROOT}/lib/*.h ${ROOT}/lib/*/*.h)
foreach(header ${headers})
    execute_process(COMMAND ${CC} -std=c17 -pedantic -Wall -Wextra -Werror -Wno-unused-function -D_GNU_SOURCE
            -I ${ROOT}/lib -x c -fsyntax-only -include ${header} /dev/null
        RESULT_VARIABLE failed ERROR_VARIABLE text)
    if(failed)
        message(SEND_ERROR "${header} does not compile alone:\n${text}")
    endif()
endforeach()
