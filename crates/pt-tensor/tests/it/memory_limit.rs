//! Paged AdamW where its moments do not fit into the memory that the process may have.
//!
//! The limit is `RLIMIT_DATA` (`ulimit -d`), on private writable memory: a file that is mapped does not count, which is what paging is about. A
//! memory cgroup would show the system writing pages out, too, and needs rights that a test does not have everywhere.

use pt_tensor::{AdamW, AdamWConfig, AdamWVariant, Device, Kind, Tensor, TensorError};
use std::process::Command;

/// What tells the child which variant it is to train with.
const VARIANT: &str = "PT_TEST_MEMORY_LIMIT";

/// Leaves in bf16: 128 MB of them and as much of gradients, whose 32-bit moments take 512 MB and 8-bit ones 130 MB.
const NUM_LEAVES: i64 = 32;
const LEAF: i64 = 1 << 21;

/// Trains two steps, and returns a sum over the bits of all leaves.
fn train(variant: AdamWVariant) -> Result<i64, TensorError> {
    pt_tensor::set_num_threads(1);
    let leaves: Vec<(String, Tensor)> = (0..NUM_LEAVES)
        .map(|index| {
            let leaf = Tensor::full([LEAF / 64, 64], 0.5 + index as f64, (Kind::BFloat16, Device::Cpu));
            (format!("leaf{index}"), leaf.set_requires_grad(true))
        })
        .collect();
    let clones = leaves.iter().map(|(name, leaf)| (name.clone(), leaf.shallow_clone())).collect();
    // The folder that cargo keeps for tests is on a disk, which the system's temporary one need not be.
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let mut adam = AdamW::new_in(folder, clones, AdamWConfig { variant, ..Default::default() })?;
    let numels = leaves.iter().map(|(_, leaf)| leaf.numel());
    assert_eq!(adam.num_state_bytes(), variant.num_state_bytes(numels));
    for step in 1..=2 {
        adam.zero_grad();
        for (index, (_, leaf)) in leaves.iter().enumerate() {
            let slope = (index as f64 - 1.5) * f64::from(step);
            let grad = Tensor::full([LEAF / 64, 64], slope, (leaf.kind(), Device::Cpu));
            pt_tensor::autograd::backward(&[leaf.shallow_clone()], &[grad])?;
        }
        adam.step(1e-2)?;
    }
    let bits = |leaf: &Tensor| leaf.detach().view_dtype(Kind::Int16).sum(Kind::Int64).int64_value(&[]);
    Ok(leaves.iter().map(|(_, leaf)| bits(leaf)).sum())
}

/// This test again in a process of its own, which may have so many bytes of private memory.
fn child(variant: AdamWVariant, limit: Option<usize>) -> String {
    let limit = limit.map_or(String::new(), |bytes| format!("ulimit -d {} && ", bytes >> 10));
    let test = "memory_limit::paged_adamw_trains_with_a_state_beyond_the_memory_limit_and_equals_the_unpaged_run";
    let output = Command::new("sh")
        .args(["-c", &format!("{limit}exec \"$0\" --exact {test} --nocapture")])
        .arg(std::env::current_exe().unwrap())
        .env(VARIANT, variant.name())
        // One thread: their stacks count as private memory.
        .envs([("OMP_NUM_THREADS", "1"), ("RUST_TEST_THREADS", "1")])
        .output()
        .unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{variant:?} did not end as a test does: {text}");
    text.lines().find_map(|line| Some(line.split_once("outcome: ")?.1.to_string())).unwrap_or_else(|| panic!("{text}"))
}

fn report(variant: AdamWVariant) {
    match train(variant) {
        Ok(sum) => println!("outcome: {sum}"),
        Err(error) => println!("outcome: {error}; {}", error.hint().unwrap_or_default()),
    }
}

#[test]
fn paged_adamw_trains_with_a_state_beyond_the_memory_limit_and_equals_the_unpaged_run() {
    const LIMIT: usize = 500 << 20;
    use AdamWVariant::{Adamw, Adamw8bit, PagedAdamw, PagedAdamw8bit};
    if let Ok(name) = std::env::var(VARIANT) {
        let all = [Adamw, Adamw8bit, PagedAdamw, PagedAdamw8bit];
        return report(all.into_iter().find(|variant| variant.name() == name).unwrap());
    }
    assert!(Adamw.num_state_bytes([(NUM_LEAVES * LEAF) as usize]) > LIMIT);
    let unlimited = child(Adamw, None);
    println!("limit on private memory: {} MB by RLIMIT_DATA", LIMIT >> 20);
    assert!(unlimited.parse::<i64>().is_ok(), "{unlimited}");
    assert_eq!(child(PagedAdamw, Some(LIMIT)), unlimited);
    let refused = child(Adamw, Some(LIMIT));
    assert!(refused.contains("out of memory: no 8388608 bytes for the optimizer state of `leaf"), "{refused}");
    assert!(refused.contains("adamw.variant=paged_adamw"), "{refused}");
    assert_eq!(child(PagedAdamw8bit, Some(LIMIT)), child(Adamw8bit, None));
}
