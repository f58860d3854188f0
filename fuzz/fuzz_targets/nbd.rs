//! See [`gnttab_fuzz::nbd`].
#![cfg_attr(fuzzing, no_main)]
gnttab_fuzz::target!(gnttab_fuzz::nbd::run);
