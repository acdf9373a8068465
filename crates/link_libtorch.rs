//! Build script shared by the crates above pt-tensor: lets their tests and binaries find libtorch
//! at run time without LD_LIBRARY_PATH. The prefix is the one that tch was built against.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if let Ok(prefix) = std::env::var("LIBTORCH") {
        // cargo looks at the time of a link itself too, so pointing `.libtorch` elsewhere counts. A folder it walks whole, which may be all of
        // /usr: there, the library speaks for it.
        let is_link = std::fs::symlink_metadata(&prefix).is_ok_and(|metadata| metadata.is_symlink());
        println!("cargo:rerun-if-changed={prefix}{}", if is_link { "" } else { "/lib/libtorch_cpu.so" });
        let prefix = std::fs::canonicalize(&prefix).unwrap_or_else(|_| prefix.into());
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", prefix.join("lib").display());
    }
}
