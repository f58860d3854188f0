//! See [`gnttab_fuzz::control`].
#![cfg_attr(fuzzing, no_main)]
gnttab_fuzz::target!(gnttab_fuzz::control::run);

/// Each caller has a thread of the machine's, and one that begins or ends while leaks are counted looks like
/// one: they are not counted here.
#[unsafe(no_mangle)]
pub extern "C" fn __asan_default_options() -> *const std::ffi::c_char {
    c"detect_leaks=0".as_ptr()
}
