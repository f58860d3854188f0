//! See [`gnttab_fuzz::xenstore`].
#![cfg_attr(fuzzing, no_main)]
gnttab_fuzz::target!(gnttab_fuzz::xenstore::run);
