//! See [`gnttab_fuzz::backend`].
#![cfg_attr(fuzzing, no_main)]
gnttab_fuzz::target!(gnttab_fuzz::backend::run);
