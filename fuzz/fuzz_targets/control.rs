//! See [`gnttab_fuzz::control`].
#![cfg_attr(fuzzing, no_main)]
gnttab_fuzz::target!(gnttab_fuzz::control::run);

/// Each caller has a thread of the machine's. What glibc notes for the end of one looks like a leak when the
/// leaks are counted while it ends.
#[unsafe(no_mangle)]
pub extern "C" fn __lsan_default_suppressions() -> *const std::ffi::c_char {
    c"leak:__cxa_thread_atexit_impl".as_ptr()
}
