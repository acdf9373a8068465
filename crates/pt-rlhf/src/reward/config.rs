//! Rewards as a configuration names them.

use std::path::PathBuf;

use pt_train::config::fields_text;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    CommandConfig, ExactConfig, ExactMatch, ExternalCommand, F1, F1Config, FormatCheck, FormatConfig, LengthConfig,
    LengthWindow, NumberConfig, NumberMatch, PatternConfig, PatternMatch, Reward, WeightedSum,
};
use crate::error::{Result, RlhfError};

/// A reward: `{type: number, extract: "####"}`, say. All take `name`, for metrics, and `weight`, a factor that is 1
/// unless given.
// The fields of each are those of its own struct, which is what refuses unknown ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum RewardSpec {
    /// Whether the response is the answer in the prompt's row.
    Exact(ExactConfig),
    /// How much of the answer in the prompt's row it has, and how little else.
    F1(F1Config),
    /// Whether its number is the one in the prompt's row.
    Number(NumberConfig),
    /// Whether a regular expression matches it.
    Pattern(PatternConfig),
    /// Whether its length is in a window.
    Length(LengthConfig),
    /// Whether it has a form: parts in order, JSON, an end.
    Format(FormatConfig),
    /// What a program prints for it.
    Command(CommandConfig),
    /// What a reward model says of it.
    Model(ModelReward),
}

/// A reward model, `pt reward`'s or one in the layout of Hugging Face's `ForSequenceClassification`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelReward {
    /// Name in metrics; null for `model`.
    pub name: Option<String>,
    /// Factor of the score in the sum of rewards.
    pub weight: f64,
    /// Folder of the model.
    pub path: PathBuf,
}

impl Default for ModelReward {
    fn default() -> Self {
        Self { name: None, weight: 1.0, path: PathBuf::new() }
    }
}

impl ModelReward {
    /// Every fault, each naming its field, what it is and what was expected.
    pub fn faults(&self) -> Vec<String> {
        let is_empty = self.path.as_os_str().is_empty();
        is_empty.then(|| "path is empty, expected the folder of a reward model".to_owned()).into_iter().collect()
    }
}

impl RewardSpec {
    /// The value of `type`.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Exact(_) => "exact",
            Self::F1(_) => "f1",
            Self::Number(_) => "number",
            Self::Pattern(_) => "pattern",
            Self::Length(_) => "length",
            Self::Format(_) => "format",
            Self::Command(_) => "command",
            Self::Model(_) => "model",
        }
    }

    /// The name that was given, if one was.
    pub fn name(&self) -> Option<&str> {
        self.shared().0
    }

    /// Factor of the score in the sum.
    pub fn weight(&self) -> f64 {
        self.shared().1
    }

    /// Every fault, each naming its field, what it is and what was expected.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if let Some(name) = self.name().filter(|name| name.trim().is_empty() || name.contains(char::is_control)) {
            faults.push(format!("name is {name:?}, expected a name of one line, or null"));
        }
        if !self.weight().is_finite() {
            faults.push(format!("weight is {}, expected a finite number", self.weight()));
        }
        faults.extend(match self {
            Self::Exact(config) => config.faults(),
            Self::F1(config) => config.faults(),
            Self::Number(config) => config.faults(),
            Self::Pattern(config) => config.faults(),
            Self::Length(config) => config.faults(),
            Self::Format(config) => config.faults(),
            Self::Command(config) => config.faults(),
            Self::Model(config) => config.faults(),
        });
        faults
    }

    /// Name and weight, which every type has.
    fn shared(&self) -> (Option<&str>, f64) {
        let (name, weight) = match self {
            Self::Exact(config) => (&config.name, config.weight),
            Self::F1(config) => (&config.name, config.weight),
            Self::Number(config) => (&config.name, config.weight),
            Self::Pattern(config) => (&config.name, config.weight),
            Self::Length(config) => (&config.name, config.weight),
            Self::Format(config) => (&config.name, config.weight),
            Self::Command(config) => (&config.name, config.weight),
            Self::Model(config) => (&config.name, config.weight),
        };
        (name.as_deref(), weight)
    }
}

/// Every fault of a run's rewards, each with its place: `rewards[0].pattern is ...`.
pub fn reward_faults(specs: &[RewardSpec]) -> Vec<String> {
    if specs.is_empty() {
        return vec!["rewards is empty, expected at least one".into()];
    }
    let mut faults = Vec::new();
    for (index, spec) in specs.iter().enumerate() {
        faults.extend(spec.faults().into_iter().map(|fault| format!("rewards[{index}].{fault}")));
        if let Some(name) = spec.name().filter(|name| specs[..index].iter().any(|other| other.name() == Some(name))) {
            faults.push(format!("rewards[{index}].name is `{name}`, expected one that no other reward has"));
        }
    }
    faults
}

/// Every type of reward with its fields, their defaults and texts: for `--help`.
pub fn rewards_text() -> String {
    fn fields<T: Default + Serialize + JsonSchema>(name: &str) -> String {
        format!("{name}:\n{}", fields_text::<T>())
    }
    [
        fields::<ExactConfig>("exact"),
        fields::<F1Config>("f1"),
        fields::<NumberConfig>("number"),
        fields::<PatternConfig>("pattern"),
        fields::<LengthConfig>("length"),
        fields::<FormatConfig>("format"),
        fields::<CommandConfig>("command"),
        fields::<ModelReward>("model"),
    ]
    .concat()
}

/// The sum of the rewards of a run. `model` makes the reward of a [`ModelReward`]; this module knows no models.
///
/// A reward without a name goes by its type, the second of a type by `number-2` and so on.
///
/// # Errors
/// [`RlhfError::Config`] with every fault of the specifications; those of `model`.
pub fn build(
    specs: &[RewardSpec],
    model: &mut dyn FnMut(&ModelReward) -> Result<Box<dyn Reward>>,
) -> Result<WeightedSum> {
    let faults = reward_faults(specs);
    if !faults.is_empty() {
        return Err(RlhfError::Config { place: "configuration".into(), faults });
    }
    let mut sum = WeightedSum::new("sum");
    for (spec, name) in specs.iter().zip(names(specs)) {
        let reward: Box<dyn Reward> = match spec {
            RewardSpec::Exact(config) => Box::new(ExactMatch::new(&name, config)?),
            RewardSpec::F1(config) => Box::new(F1::new(&name, config)?),
            RewardSpec::Number(config) => Box::new(NumberMatch::new(&name, config)?),
            RewardSpec::Pattern(config) => Box::new(PatternMatch::new(&name, config)?),
            RewardSpec::Length(config) => Box::new(LengthWindow::new(&name, config)?),
            RewardSpec::Format(config) => Box::new(FormatCheck::new(&name, config)?),
            RewardSpec::Command(config) => Box::new(ExternalCommand::new(&name, config)?),
            RewardSpec::Model(config) => model(config)?,
        };
        sum.push(name, spec.weight(), reward);
    }
    Ok(sum)
}

/// A name for each, no two alike where those given are not.
fn names(specs: &[RewardSpec]) -> Vec<String> {
    let mut taken: Vec<String> = specs.iter().filter_map(RewardSpec::name).map(str::to_owned).collect();
    let mut names = Vec::with_capacity(specs.len());
    for spec in specs {
        let name = spec.name().map_or_else(
            || {
                let mut name = spec.type_name().to_owned();
                let mut copies = 1;
                while taken.contains(&name) {
                    copies += 1;
                    name = format!("{}-{copies}", spec.type_name());
                }
                taken.push(name.clone());
                name
            },
            str::to_owned,
        );
        names.push(name);
    }
    names
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::{LengthUnit, Normalization, Percent, Sample};
    use super::*;

    fn parse(json: &str) -> Vec<RewardSpec> {
        serde_json::from_str(json).expect(json)
    }

    fn no_model(_: &ModelReward) -> Result<Box<dyn Reward>> {
        panic!("no reward model was asked for")
    }

    #[test]
    fn every_type_is_read_and_written_under_its_name() {
        let specs = parse(
            r#"[
            {"type": "exact", "answer_field": "target", "extract": "x(.)", "normalization": "squad", "contains": true},
            {"type": "f1", "answer_field": "right"},
            {"type": "number", "extract": "=", "percent": "hundredths", "tolerance": 1},
            {"type": "pattern", "pattern": "a", "whole": true, "matched": 2, "unmatched": -1},
            {"type": "length", "unit": "words", "min": 1, "max": 9, "falloff": 2},
            {"type": "format", "parts": ["a"], "json": true, "ended": true},
            {"type": "command", "command": ["true"], "timeout": 1},
            {"type": "model", "path": "rm", "name": "judge", "weight": 0.5}
        ]"#,
        );
        let RewardSpec::Exact(exact) = &specs[0] else { panic!("exact") };
        assert_eq!((exact.normalization, exact.contains, exact.weight), (Normalization::Squad, true, 1.0));
        assert!(matches!(&specs[2], RewardSpec::Number(number) if number.percent == Percent::Hundredths));
        assert!(matches!(&specs[4], RewardSpec::Length(length) if length.unit == LengthUnit::Words));
        for spec in &specs {
            let json = serde_json::to_value(spec).expect("has a JSON form");
            assert_eq!(json["type"], spec.type_name());
            assert_eq!(serde_json::from_value::<RewardSpec>(json).expect("reads what it wrote"), *spec);
            assert!(spec.faults().is_empty());
        }
        assert_eq!((specs[7].name(), specs[7].weight()), (Some("judge"), 0.5));
    }

    #[test]
    fn unknown_types_and_fields_are_refused() {
        let error = |json: &str| serde_json::from_str::<RewardSpec>(json).expect_err(json).to_string();
        assert!(
            error(r#"{"type": "numbr"}"#).contains("unknown variant `numbr`, expected one of `exact`, `f1`, `number`")
        );
        assert!(error(r#"{"extract": "a"}"#).contains("missing field `type`"));
        for spec in ["exact", "f1", "number", "pattern", "length", "format", "command", "model"] {
            let text = error(&format!(r#"{{"type": "{spec}", "wieght": 1}}"#));
            assert!(text.contains("unknown field `wieght`") && text.contains("`weight`"), "{text}");
        }
    }

    #[test]
    fn help_has_every_type_with_its_fields() {
        let text = rewards_text();
        let parts =
            ["exact:", "f1:", "number:", "pattern:", "length:", "format:", "command:", "model:", "  timeout=60"];
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }

    #[test]
    fn the_schema_describes_every_type() {
        let schema = schemars::schema_for!(RewardSpec).as_value().to_string();
        for spec in ["exact", "f1", "number", "pattern", "length", "format", "command", "model"] {
            assert!(schema.contains(&format!("\"{spec}\"")), "{spec}");
        }
    }

    #[test]
    fn all_faults_are_listed_with_their_places() {
        assert_eq!(reward_faults(&[]), ["rewards is empty, expected at least one"]);
        let mut specs = parse(
            r#"[{"type": "pattern", "pattern": "(", "name": "a"}, {"type": "model", "name": "a"},
                {"type": "length", "name": " "}]"#,
        );
        if let RewardSpec::Pattern(config) = &mut specs[0] {
            config.weight = f64::NAN;
        }
        let faults = reward_faults(&specs);
        let starts = [
            "[0].weight is NaN",
            "[0].pattern is \"(\"",
            "[1].path is empty",
            "[1].name is `a`",
            "[2].name is \" \"",
            "[2].min is 0",
        ];
        assert_eq!(faults.len(), starts.len(), "{faults:?}");
        for (fault, start) in faults.iter().zip(starts) {
            assert!(fault.starts_with(&format!("rewards{start}")), "{fault}");
        }
        let error = build(&specs, &mut no_model).err().expect("refused").to_string();
        assert!(error.starts_with("configuration: rewards[0].weight is NaN"), "{error}");
    }

    #[test]
    fn names_come_from_types_and_are_never_the_same() {
        let specs = parse(
            r#"[{"type": "number"}, {"type": "number"}, {"type": "exact", "name": "number-2"}, {"type": "number"},
                {"type": "exact"}]"#,
        );
        assert_eq!(names(&specs), ["number", "number-3", "number-2", "number-4", "exact"]);
        let sum = build(&specs, &mut no_model).expect("good");
        assert!(sum.names().eq(["number", "number-3", "number-2", "number-4", "exact"]));
    }

    #[test]
    fn a_model_is_made_by_the_caller() {
        struct Half;
        impl Reward for Half {
            fn name(&self) -> &str {
                "half"
            }
            fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<f64>> {
                Ok(vec![0.5; samples.len()])
            }
        }
        let specs = parse(r#"[{"type": "exact"}, {"type": "model", "path": "rm", "weight": 2}]"#);
        let mut asked = Vec::new();
        let mut model = |config: &ModelReward| -> Result<Box<dyn Reward>> {
            asked.push(config.path.clone());
            Ok(Box::new(Half))
        };
        let mut sum = build(&specs, &mut model).expect("good");
        assert_eq!(asked, [PathBuf::from("rm")]);
        assert_eq!(scores(&mut sum, r#"{"answer": "a"}"#, &["a", "b"]), [2.0, 1.0]);
        let mut broken = |_: &ModelReward| -> Result<Box<dyn Reward>> {
            Err(RlhfError::Reward { reward: "model".into(), message: "no such folder".into(), hint: None })
        };
        assert!(matches!(build(&specs, &mut broken), Err(RlhfError::Reward { .. })));
    }
}
