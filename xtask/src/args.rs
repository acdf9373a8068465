//! What was asked for, and the text of `--help`.

/// A worked example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Demo {
    Sft,
    Dpo,
    Rlhf,
    Grpo,
}

/// One invocation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Task {
    Help(Option<&'static str>),
    Setup,
    Fetch { names: Vec<String> },
    Test { extra: Vec<String> },
    TestNeon,
    Demo { demo: Demo, extra: Vec<String> },
    Golden { area: Option<String>, regenerate: bool },
    Bench { suites: Vec<String>, peers: bool, extra: Vec<String> },
    Tidy { quick: bool },
    Ci,
}

/// Name, arguments, summary, details.
const TASKS: [(&str, &str, &str, &str); 9] = [
    (
        "setup",
        "",
        "make libtorch usable by plain cargo",
        "Downloads the pinned CPU libtorch into the user's cache, checks it, and links it as .libtorch.\n\
         LIBTORCH (a prefix of your own) or LIBTORCH_USE_PYTORCH=1 (an installed PyTorch) win, and are only checked.\n\
         A second run changes nothing.",
    ),
    (
        "fetch",
        "[NAME..]",
        "fetch models or data sets; without a name, list them",
        "Prints licence, size and path of each. Files go to the user's cache and are pinned by SHA-256.",
    ),
    (
        "test",
        "[CARGO TEST ARGUMENTS..]",
        "set up, fetch the small model, run every test",
        "Without -p, the whole workspace with doc tests. All arguments go to `cargo test`. The last line is\n\
         `N passed, N failed`. On x86-64 Linux the kernels for 64-bit Arm are run too where `test-neon` can.",
    ),
    (
        "test-neon",
        "",
        "run pt-quant's tests for 64-bit Arm under QEMU",
        "Needs the target's standard library, a cross linker and qemu-user-static, and says how to get what is missing.",
    ),
    (
        "demo",
        "[sft|dpo|rlhf|grpo] [-- PT ARGUMENTS..]",
        "train a real model on real data",
        "Sets up, fetches SmolLM2-135M-Instruct and the demo data, builds `pt`, and runs `pt demo` sft, dpo, rlhf or grpo.",
    ),
    (
        "golden",
        "[AREA] [--regenerate]",
        "compare with the reference implementations' numbers",
        "Runs the tests whose names contain `golden_AREA`, or those of all areas. With --regenerate, makes the pinned\n\
         Python environment and writes the fixtures anew with fixtures/generate/<AREA>.py. Those are the areas.\n\
         `golden interop` goes the other way: it makes the environments, and has PEFT, AdapterHub's package and\n\
         transformers load what `pt` wrote (adapters and merged models, tiny ones and SmolLM2's) and compare logits.\n\
         Only when named: it takes minutes, and 3 GB of disk beside the environments.",
    ),
    (
        "bench",
        "[SUITE..] [--peers] [-- SUITE ARGUMENTS..]",
        "run benchmarks; with --peers, beside the Python tools",
        "Without a suite, all of them. --peers makes the pinned Python environment of benches/peers and passes it on.",
    ),
    (
        "tidy",
        "[--quick]",
        "format, clippy, docs, house rules",
        "Runs every check even when one fails, then lists what failed. --quick leaves out clippy and docs, which\n\
         need libtorch.",
    ),
    ("ci", "", "test, then tidy", "What a pull request must pass."),
];

/// The help text: of one task, or the list.
pub(crate) fn usage(topic: Option<&'static str>) -> String {
    if let Some((name, arguments, summary, details)) = TASKS.iter().find(|task| Some(task.0) == topic) {
        let line = format!("{name} {arguments}");
        return format!("Usage: cargo xtask {}\n\n{summary}\n\n{details}", line.trim_end());
    }
    let mut text = String::from("Usage: cargo xtask <TASK>\n\nTasks:\n");
    for (name, arguments, summary, _) in TASKS {
        let line = format!("{name} {arguments}");
        text += &format!("  {:<50} {summary}\n", line.trim_end());
    }
    text + "\n`cargo xtask <TASK> --help` says more."
}

/// Reads the arguments after the program's name.
pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Task, String> {
    let mut arguments = arguments.peekable();
    let name = arguments.next().ok_or("no task given")?;
    if matches!(name.as_str(), "-h" | "--help" | "help") {
        return Ok(Task::Help(None));
    }
    let Some((name, ..)) = TASKS.iter().find(|task| task.0 == name) else {
        return Err(format!("unknown task `{name}`"));
    };
    if matches!(arguments.peek().map(String::as_str), Some("-h" | "--help")) {
        return Ok(Task::Help(Some(name)));
    }
    if *name == "test" {
        return Ok(Task::Test { extra: arguments.collect() });
    }

    let mut words = Vec::new();
    let mut flags = Vec::new();
    for argument in arguments.by_ref() {
        match argument.as_str() {
            "--" => break,
            _ if argument.starts_with('-') => flags.push(argument),
            _ => words.push(argument),
        }
    }
    let extra: Vec<String> = arguments.collect();

    let known_flag = match *name {
        "golden" => "--regenerate",
        "bench" => "--peers",
        "tidy" => "--quick",
        _ => "",
    };
    let is_flag_set = flags.iter().any(|flag| flag == known_flag);
    if let Some(flag) = flags.iter().find(|flag| *flag != known_flag) {
        return Err(format!("`{name}` has no flag `{flag}`"));
    }
    if !extra.is_empty() && !matches!(*name, "demo" | "bench") {
        return Err(format!("`{name}` takes nothing after `--`"));
    }
    let max_words = match *name {
        "fetch" | "bench" => usize::MAX,
        "golden" | "demo" => 1,
        _ => 0,
    };
    if let Some(word) = words.get(max_words) {
        return Err(format!("`{name}` has no use for `{word}`"));
    }
    Ok(match *name {
        "setup" => Task::Setup,
        "test-neon" => Task::TestNeon,
        "fetch" => Task::Fetch { names: words },
        "demo" => match words.first().map(String::as_str) {
            None | Some("sft") => Task::Demo { demo: Demo::Sft, extra },
            Some("dpo") => Task::Demo { demo: Demo::Dpo, extra },
            Some("rlhf") => Task::Demo { demo: Demo::Rlhf, extra },
            Some("grpo") => Task::Demo { demo: Demo::Grpo, extra },
            Some(other) => {
                return Err(format!("there is no demo `{other}`; there are `sft`, `dpo`, `rlhf` and `grpo`"));
            }
        },
        "golden" => Task::Golden { area: words.pop(), regenerate: is_flag_set },
        "bench" => Task::Bench { suites: words, peers: is_flag_set, extra },
        "tidy" => Task::Tidy { quick: is_flag_set },
        _ => Task::Ci,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Task, String> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn each_task_parses() {
        assert_eq!(parsed("setup"), Ok(Task::Setup));
        assert_eq!(parsed("tidy"), Ok(Task::Tidy { quick: false }));
        assert_eq!(parsed("tidy --quick"), Ok(Task::Tidy { quick: true }));
        assert_eq!(parsed("ci"), Ok(Task::Ci));
        assert_eq!(parsed("fetch gsm8k boolq"), Ok(Task::Fetch { names: strings(&["gsm8k", "boolq"]) }));
        assert_eq!(parsed("demo"), Ok(Task::Demo { demo: Demo::Sft, extra: vec![] }));
        let extra = strings(&["--steps", "3"]);
        assert_eq!(parsed("demo dpo -- --steps 3"), Ok(Task::Demo { demo: Demo::Dpo, extra }));
        assert_eq!(
            parsed("golden lora --regenerate"),
            Ok(Task::Golden { area: Some("lora".into()), regenerate: true })
        );
        assert_eq!(
            parsed("bench sft generate --peers -- --steps 2"),
            Ok(Task::Bench { suites: strings(&["sft", "generate"]), peers: true, extra: strings(&["--steps", "2"]) })
        );
    }

    #[test]
    fn test_passes_everything_to_cargo() {
        let expected = Task::Test { extra: strings(&["-p", "pt-model", "--", "--nocapture"]) };
        assert_eq!(parsed("test -p pt-model -- --nocapture"), Ok(expected));
    }

    #[test]
    fn unknown_tasks_flags_and_words_are_refused_by_name() {
        for (line, named) in [
            ("frobnicate", "frobnicate"),
            ("setup --force", "--force"),
            ("golden --peers", "--peers"),
            ("tidy crates", "crates"),
            ("golden a b", "`b`"),
            ("demo ppo", "ppo"),
            ("setup -- x", "--"),
        ] {
            let message = parsed(line).unwrap_err();
            assert!(message.contains(named), "{line}: {message}");
        }
        assert!(parsed("").is_err());
    }

    #[test]
    fn help_lists_every_task() {
        assert_eq!(parsed("--help"), Ok(Task::Help(None)));
        assert_eq!(parsed("bench --help"), Ok(Task::Help(Some("bench"))));
        let text = usage(None);
        for (name, ..) in TASKS {
            assert!(text.contains(name), "{name}");
            assert!(usage(Some(name)).starts_with(&format!("Usage: cargo xtask {name}")));
        }
    }
}
