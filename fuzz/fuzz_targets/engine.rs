//! See [`gnttab_fuzz::engine`].
#![cfg_attr(fuzzing, no_main)]
gnttab_fuzz::target!(gnttab_fuzz::engine::run);
