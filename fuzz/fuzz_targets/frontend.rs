//! See [`gnttab_fuzz::frontend`].
#![cfg_attr(fuzzing, no_main)]
gnttab_fuzz::target!(gnttab_fuzz::frontend::run);
