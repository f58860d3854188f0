//! See [`gnttab_fuzz::control`].
#![cfg_attr(fuzzing, no_main)]
gnttab_fuzz::target!(gnttab_fuzz::control::run);
