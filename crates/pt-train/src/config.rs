//! Reading a run's configuration: YAML, single fields from the command line, names that nearly fit.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_yaml_ng::{Mapping, Value};

use crate::error::{Result, TrainError};

/// The section of a run's settings whose fields `--set` reaches without its name.
const OBJECTIVE: &str = "objective.";

/// Loads a configuration from an optional YAML file, then sets single fields.
///
/// `sets` are pairs of a dotted field and a value in YAML, as in `--set optim.learning_rate=1e-4`; a later one
/// wins. Fields of the section `objective` go without its name, too: `--set beta=0.2` is
/// `--set objective.loss.beta=0.2`. Fields not named keep their defaults, for which `T` (and each struct in it) carries
/// `#[serde(default, deny_unknown_fields)]`.
///
/// # Errors
/// [`TrainError::Read`]; [`TrainError::UnknownKey`] with the nearest known name; [`TrainError::Config`] with
/// the field for a value of the wrong kind.
///
/// # Example
/// ```
/// use pt_train::config::load_config;
/// use pt_train::schedule::ScheduleConfig;
/// let config: ScheduleConfig = load_config(None, &[("warmup_steps".into(), "4".into())])?;
/// assert_eq!(config.warmup_steps, Some(4));
/// let error = load_config::<ScheduleConfig>(None, &[("warmup_step".into(), "4".into())]).unwrap_err();
/// assert_eq!(error.to_string(), "--set warmup_step=4: unknown key `warmup_step`, did you mean `warmup_steps`?");
/// # Ok::<(), pt_train::TrainError>(())
/// ```
pub fn load_config<T: Serialize + DeserializeOwned + Default>(
    path: Option<&Path>,
    sets: &[(String, String)],
) -> Result<T> {
    let mut tree = Value::Mapping(Mapping::new());
    let mut place = "configuration".to_owned();
    if let Some(path) = path {
        place = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(TrainError::read(path))?;
        // The file is judged alone first, so that its messages carry its own lines.
        let file: Value =
            serde_yaml_ng::from_str(&text).map_err(|error| config_error(&place, "", &error.to_string()))?;
        match file {
            Value::Null => {}
            Value::Mapping(_) => {
                serde_yaml_ng::from_str::<T>(&text).map_err(|error| config_error(&place, "", &error.to_string()))?;
                tree = file;
            }
            _ => {
                return Err(TrainError::Config {
                    place,
                    message: "holds no mapping, expected `key: value` lines".into(),
                });
            }
        }
    }
    let fields: Vec<String> = flatten(&T::default()).into_iter().map(|(name, _)| name).collect();
    for (key, text) in sets {
        place = format!("--set {key}={text}");
        let value: Value =
            serde_yaml_ng::from_str(text).map_err(|error| config_error(&place, key, &error.to_string()))?;
        let key = &whole_name(key, &fields);
        set_field(&mut tree, key, value).map_err(|message| TrainError::Config { place: place.clone(), message })?;
        // Each is judged as it comes, so that the message names the one at fault.
        parse_tree::<T>(&tree).map_err(|message| with_objective(config_error(&place, key, &message), &fields))?;
    }
    if matches!(&tree, Value::Mapping(fields) if fields.is_empty()) {
        return Ok(T::default());
    }
    parse_tree(&tree).map_err(|message| config_error(&place, "", &message))
}

/// The whole configuration as YAML, defaults filled in: what a run keeps beside its results.
///
/// # Errors
/// [`TrainError::Config`] when a value has no YAML form.
pub fn to_yaml(config: &impl Serialize) -> Result<String> {
    serde_yaml_ng::to_string(config)
        .map_err(|error| TrainError::Config { place: "configuration".into(), message: error.to_string() })
}

/// As [`to_yaml`], each field under the text of its doc comment: what `--print-config` shows.
///
/// # Errors
/// As [`to_yaml`].
///
/// # Example
/// ```
/// use pt_train::config::to_commented_yaml;
/// use pt_train::schedule::ScheduleConfig;
/// let yaml = to_commented_yaml(&ScheduleConfig::default())?;
/// assert!(yaml.starts_with("# `constant`, `linear`, `cosine` or `wsd`.\nkind: cosine\n"));
/// # Ok::<(), pt_train::TrainError>(())
/// ```
pub fn to_commented_yaml<T: Serialize + JsonSchema>(config: &T) -> Result<String> {
    let docs = field_docs::<T>();
    let mut text = String::new();
    // The names on the way to the line at hand, with the columns that they start at.
    let mut path: Vec<(usize, &str)> = Vec::new();
    let yaml = to_yaml(config)?;
    for line in yaml.lines() {
        let column = line.len() - line.trim_start().len();
        if let Some((name, _)) = line.trim_start().split_once(':').filter(|(name, _)| !name.starts_with("- ")) {
            path.retain(|(start, _)| *start < column);
            path.push((column, name));
            let dotted = path.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(".");
            if let Some(doc) = docs.get(&dotted) {
                let indent = " ".repeat(column);
                text.extend(wrapped(doc, 100).iter().map(|part| format!("{indent}# {part}\n")));
            }
        }
        text.push_str(line);
        text.push('\n');
    }
    Ok(text)
}

/// Every field with its default and its doc comment, two lines or more each: for `--help`.
pub fn fields_text<T: Default + Serialize + JsonSchema>() -> String {
    let docs = field_docs::<T>();
    let mut text = String::new();
    for (name, value) in flatten(&T::default()) {
        text += &format!("  {name}={value}\n");
        let doc = docs.get(&name).map_or("", String::as_str);
        text.extend(wrapped(doc, 84).iter().map(|line| format!("          {line}\n")));
    }
    text
}

/// Doc comments of a configuration's fields and sections, by dotted name, each as one line.
pub fn field_docs<T: JsonSchema>() -> BTreeMap<String, String> {
    fn walk(prefix: &str, schema: &serde_json::Value, docs: &mut BTreeMap<String, String>) {
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            if let Some(text) = field["description"].as_str() {
                docs.insert(path.clone(), text.split_whitespace().collect::<Vec<_>>().join(" "));
            }
            walk(&path, field, docs);
        }
        // An optional section is one of itself and null.
        schema["anyOf"].as_array().into_iter().flatten().for_each(|choice| walk(prefix, choice, docs));
    }
    let mut settings = SchemaSettings::default();
    settings.inline_subschemas = true;
    let mut docs = BTreeMap::new();
    walk("", settings.into_generator().into_root_schema_for::<T>().as_value(), &mut docs);
    docs
}

/// Lines of at most `width` characters, where no word is longer.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut().filter(|line| line.chars().count() + word.chars().count() < width) {
            Some(line) => {
                line.push(' ');
                line.push_str(word);
            }
            None => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Splits `key=value`, as the command line gives it.
///
/// # Errors
/// [`TrainError::Config`] without an equals sign or a key.
pub fn parse_set(text: &str) -> Result<(String, String)> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.to_owned())),
        _ => Err(TrainError::Config { place: format!("--set {text}"), message: "expected key=value".into() }),
    }
}

/// All fields with their dotted names and values, in order: for a table in a report.
pub fn flatten(config: &impl Serialize) -> Vec<(String, String)> {
    fn walk(prefix: &str, value: &serde_json::Value, out: &mut Vec<(String, String)>) {
        match value {
            serde_json::Value::Object(fields) if !fields.is_empty() => {
                for (name, value) in fields {
                    let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                    walk(&path, value, out);
                }
            }
            serde_json::Value::String(text) => out.push((prefix.to_owned(), text.clone())),
            other => out.push((prefix.to_owned(), other.to_string())),
        }
    }
    let mut out = Vec::new();
    walk("", &serde_json::to_value(config).unwrap_or_default(), &mut out);
    out
}

/// The known name most like `name`, if one is near enough to be meant.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace(['-', '_', ' '], "");
    let wanted = plain(name);
    let score = |candidate: &str| {
        // `lr` for `learning_rate`: as short as it is, it looks more like other names.
        if candidate.split('_').count() > 1
            && candidate.split('_').filter_map(|word| word.chars().next()).eq(wanted.chars())
        {
            return 1.0;
        }
        let candidate = plain(candidate);
        // A name cut short or carried on is meant as often as a slip of the key: `lr_scheduler` for `scheduler`.
        let part = if wanted.len() >= 4
            && candidate.len() >= 4
            && (candidate.contains(&wanted) || wanted.contains(&candidate))
        {
            0.8
        } else {
            0.0
        };
        strsim::jaro_winkler(&wanted, &candidate).max(part)
    };
    known
        .into_iter()
        .map(|candidate| (score(candidate), candidate))
        .filter(|(score, _)| *score >= 0.78)
        .max_by(|one, other| one.0.total_cmp(&other.0))
        .map(|(_, candidate)| candidate)
}

fn parse_tree<T: DeserializeOwned>(tree: &Value) -> Result<T, String> {
    // Through text, since only the text reader says which field is at fault; its line numbers mean nothing here.
    let text = serde_yaml_ng::to_string(tree).map_err(|error| error.to_string())?;
    serde_yaml_ng::from_str(&text).map_err(|error| {
        let message = error.to_string();
        message.rsplit_once(" at line ").map_or(message.clone(), |(head, _)| head.to_owned())
    })
}

/// The dotted name of a field that `--set` may name without the sections of the objective that it stands in.
fn whole_name(key: &str, fields: &[String]) -> String {
    let section = key.split('.').next().unwrap_or(key);
    let is_known = fields.iter().any(|field| field.split('.').next() == Some(section));
    let end = format!(".{key}");
    match fields.iter().find(|field| field.starts_with(OBJECTIVE) && field.ends_with(&end)) {
        Some(field) if !is_known => field.clone(),
        _ => key.to_owned(),
    }
}

fn set_field(tree: &mut Value, key: &str, value: Value) -> Result<(), String> {
    let mut at = tree;
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        if part.is_empty() {
            return Err("expected names joined by single dots".into());
        }
        if at.is_null() {
            *at = Value::Mapping(Mapping::new());
        }
        let Value::Mapping(fields) = at else {
            return Err(format!("`{part}` cannot be set: what holds it is no mapping"));
        };
        if parts.peek().is_none() {
            fields.insert(Value::String(part.to_owned()), value);
            return Ok(());
        }
        at = fields.entry(Value::String(part.to_owned())).or_insert(Value::Null);
    }
    Err("expected a key".into())
}

/// Turns serde's `a.b: unknown field `x`, expected one of ..` into an error with a suggestion.
fn config_error(place: &str, set_key: &str, message: &str) -> TrainError {
    let unknown =
        message.split_once("unknown field `").and_then(|(before, rest)| Some((before, rest.split_once('`')?)));
    let Some((before, (name, rest))) = unknown else {
        // For --set the key stands in the place already.
        let message = message.strip_prefix(&format!("{set_key}: ")).unwrap_or(message);
        return TrainError::Config { place: place.to_owned(), message: message.to_owned() };
    };
    let known: Vec<String> = rest.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    let container = before.trim_end_matches(": ");
    let join = |name: &str| if container.is_empty() { name.to_owned() } else { format!("{container}.{name}") };
    TrainError::UnknownKey {
        place: place.to_owned(),
        key: join(name),
        suggestion: nearest(name, known.iter().map(String::as_str)).map(join),
        known,
    }
}

/// An unknown key beside what an objective's fields go by on the command line: their names without its own.
fn with_objective(error: TrainError, fields: &[String]) -> TrainError {
    let TrainError::UnknownKey { place, key, suggestion, mut known } = error else { return error };
    if key.contains('.') {
        return TrainError::UnknownKey { place, key, suggestion, known };
    }
    let names: Vec<&str> = fields.iter().filter_map(|field| field.strip_prefix(OBJECTIVE)).collect();
    // The last part will do where it is the only one so called.
    let lasts = names.iter().map(|name| name.rsplit('.').next().unwrap_or(name));
    let near = nearest(&key, names.iter().copied().chain(lasts).chain(known.iter().map(String::as_str)));
    let suggestion = near.map(str::to_owned);
    known.retain(|name| *name != OBJECTIVE.trim_end_matches('.'));
    for name in names.iter().map(|name| name.split('.').next().unwrap_or(name)) {
        if !known.iter().any(|it| it == name) {
            known.push(name.to_owned());
        }
    }
    TrainError::UnknownKey { place, key, suggestion, known }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Inner {
        rank: usize,
        lora_alpha: f64,
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Outer {
        learning_rate: f64,
        name: Option<String>,
        peft: Inner,
    }

    fn sets(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn load(yaml: &str, pairs: &[(&str, &str)]) -> Result<Outer> {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("run.yaml");
        std::fs::write(&path, yaml).expect("write");
        load_config(Some(&path), &sets(pairs))
    }

    #[test]
    fn fields_come_from_file_then_sets_then_defaults() {
        let config = load("learning_rate: 1e-4\npeft:\n  rank: 8\n", &[("peft.lora_alpha", "16"), ("name", "x y")])
            .expect("good");
        let expected =
            Outer { learning_rate: 1e-4, name: Some("x y".into()), peft: Inner { rank: 8, lora_alpha: 16.0 } };
        assert_eq!(config, expected);
        let again: Outer = serde_yaml_ng::from_str(&to_yaml(&config).expect("serialises")).expect("parses");
        assert_eq!(again, expected);
        assert_eq!(load("# nothing\n", &[]).expect("empty is all defaults"), Outer::default());
        assert_eq!(flatten(&config)[2], ("peft.rank".into(), "8".into()));
    }

    #[test]
    fn fields_of_the_objective_go_without_its_name() {
        use crate::sft::{SftConfig, SftLoss};
        let config: SftConfig = load_config(None, &sets(&[("loss", "dft")])).expect("the objective's");
        assert_eq!(config.objective.loss, SftLoss::Dft);
        let config: SftConfig = load_config(None, &sets(&[("objective.loss", "dft")])).expect("its whole name");
        assert_eq!(config.objective.loss, SftLoss::Dft);
        let error = load_config::<SftConfig>(None, &sets(&[("los", "dft")])).expect_err("a typo");
        assert!(error.to_string().contains("did you mean `loss`?"), "{error}");
        let hint = error.hint().expect("a hint");
        assert!(hint.contains("loss") && !hint.contains("objective"), "{hint}");
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest_name() {
        let error = load("peft:\n  lora_alhpa: 3\n", &[]).expect_err("a typo");
        let text = error.to_string();
        assert!(text.ends_with("run.yaml: unknown key `peft.lora_alhpa`, did you mean `peft.lora_alpha`?"), "{text}");
        assert_eq!(error.hint().expect("a hint"), "known keys here: rank, lora_alpha");
        let error = load("", &[("learning-rate", "1")]).expect_err("a typo");
        assert!(error.to_string().contains("did you mean `learning_rate`?"), "{error}");
        assert!(matches!(load("zzz: 1\n", &[]), Err(TrainError::UnknownKey { suggestion: None, .. })));
    }

    #[test]
    fn wrong_values_name_field_and_place() {
        let error = load("", &[("peft.rank", "many")]).expect_err("no number").to_string();
        assert!(error.starts_with("--set peft.rank=many: ") && error.contains("expected usize"), "{error}");
        let error = load("learning_rate: fast\n", &[]).expect_err("no number").to_string();
        assert!(error.contains("learning_rate") && error.contains("line 1"), "{error}");
        assert!(load("- a\n", &[]).expect_err("a list").to_string().contains("no mapping"));
        assert!(load("a: [", &[]).is_err());
        assert!(load("", &[("peft..rank", "1")]).is_err() && load("", &[("name.x", "1")]).is_err());
        assert!(parse_set("rank").is_err());
        assert_eq!(parse_set("a.b=c=d").expect("good"), ("a.b".into(), "c=d".into()));
    }

    #[test]
    fn every_field_of_fine_tuning_has_a_line_of_help() {
        use crate::sft::SftConfig;
        let docs = field_docs::<SftConfig>();
        for (name, _) in flatten(&SftConfig::default()) {
            assert!(docs.contains_key(&name), "{name}");
        }
        for section in ["schedule", "adamw", "batch", "data", "lora"] {
            assert!(docs.contains_key(section), "{section}");
        }
        let yaml = to_commented_yaml(&SftConfig::default()).expect("serialises");
        assert!(yaml.contains("\n  # Rank of the update, at least 1.\n  rank: 16\n"), "{yaml}");
        let again: SftConfig = serde_yaml_ng::from_str(&yaml).expect("comments are no values");
        assert_eq!(again, SftConfig::default());
        assert_eq!(wrapped("ab cd efghijk", 5), ["ab cd", "efghijk"]);
    }

    #[test]
    fn nearest_forgives_slips_and_parts_and_nothing_else() {
        let known = ["learning_rate", "batch_size", "scheduler", "max_length"];
        assert_eq!(nearest("lerning_rate", known), Some("learning_rate"));
        assert_eq!(nearest("lr_scheduler", known), Some("scheduler"));
        assert_eq!(nearest("maxLength", known), Some("max_length"));
        assert_eq!(nearest("q", known), None);
    }
}
