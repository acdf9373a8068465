//! Build script shared by the crates above pt-tensor: lets their tests and binaries find libtorch
//! at run time without LD_LIBRARY_PATH. The prefix is the one that tch was built against.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if let Ok(prefix) = std::env::var("LIBTORCH") {
        // As it was given: cargo looks at the time of a link itself too, so pointing `.libtorch` elsewhere counts.
        println!("cargo:rerun-if-changed={prefix}");
        let prefix = std::fs::canonicalize(&prefix).unwrap_or_else(|_| prefix.into());
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", prefix.join("lib").display());
    }
}
