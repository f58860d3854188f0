//! Links a kernel: no C library, no start files, our own layout.

fn main() {
    let folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo::rerun-if-changed=kernel.ld");
    // The layout is a linker script, which not every linker reads that a machine may have set as its own.
    for argument in ["-fuse-ld=bfd", "-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    for argument in [
        &format!("-T{folder}/kernel.ld"),
        "--build-id=none",
        "-zmax-page-size=4096",
        "-znoexecstack",
        "-znorelro",
    ] {
        println!("cargo::rustc-link-arg-bins=-Wl,{argument}");
    }
}
