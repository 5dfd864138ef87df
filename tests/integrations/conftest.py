"""The ranks of one launch, as in tests/parallel."""

from tests.parallel.conftest import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_generate_tests,
    pytest_pyfunc_call,
    pytest_runtest_setup,
    pytest_unconfigure,
    ranks,
    run_seed,
    shared_tmp_path,
)
