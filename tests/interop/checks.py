"""What does not hold in a test, counted over all of its modules: a check of a module that a test borrows counts in the test."""
failed = 0


def check(ok, what):
    global failed
    if not ok:
        failed += 1
        print("FAIL:", what)
