//! Compiles the C++ shim against the libtorch that tch is built with, and lets this crate's tests find it.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    for file in
        ["csrc/shim.cpp", "csrc/fused.cpp", "csrc/attention.cpp", "csrc/decode.cpp", "csrc/memory.cpp", "csrc/simd.h"]
    {
        println!("cargo:rerun-if-changed={file}");
    }
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=LIBTORCH_USE_PYTORCH");
    if let Some(given) = env::var_os("LIBTORCH") {
        // As in link_libtorch.rs: the time of a link counts, so pointing `.libtorch` elsewhere compiles the shim anew.
        let prefix = PathBuf::from(given);
        let is_link = std::fs::symlink_metadata(&prefix).is_ok_and(|metadata| metadata.is_symlink());
        let watched = if is_link { prefix } else { prefix.join("lib/libtorch_cpu.so") };
        println!("cargo:rerun-if-changed={}", watched.display());
    }
    let Some(prefix) = libtorch_prefix() else {
        println!(
            "cargo:warning=no libtorch found: run `cargo xtask setup`, or set LIBTORCH to a prefix with lib/ and include/"
        );
        std::process::exit(1);
    };
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .opt_level(3)
        .include(prefix.join("include"))
        .include(prefix.join("include/torch/csrc/api/include"))
        .flag_if_supported("-fno-math-errno")
        // The sums marked `omp simd` vectorize with or without OpenMP's threads.
        .flag_if_supported("-fopenmp-simd")
        .warnings(false)
        .files(["csrc/shim.cpp", "csrc/fused.cpp", "csrc/attention.cpp", "csrc/decode.cpp", "csrc/memory.cpp"]);
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        // libtorch's thread pool is OpenMP there; its own libgomp is the one that gets loaded.
        build.flag("-fopenmp");
        println!("cargo:rustc-link-lib=gomp");
    }
    build.compile("pt_tensor_shim");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", prefix.join("lib").display());
}

/// The prefix in LIBTORCH, or the installed PyTorch when LIBTORCH_USE_PYTORCH asks for it, as tch decides.
fn libtorch_prefix() -> Option<PathBuf> {
    if env::var_os("LIBTORCH_USE_PYTORCH").is_some() {
        let script = "import os, torch; print(os.path.dirname(torch.__file__))";
        let output = Command::new("python3").args(["-c", script]).output().ok()?;
        return output.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    let prefix = std::fs::canonicalize(env::var_os("LIBTORCH")?).ok()?;
    prefix.join("include").is_dir().then_some(prefix)
}
