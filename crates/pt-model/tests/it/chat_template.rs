use crate::common::{cases, read_json, smollm2};
use pt_model::{ChatTemplate, Message, Pretrained};

#[test]
fn golden_chat_template_texts_equal_those_of_transformers() {
    let mut faults = Vec::new();
    for folder in cases("chat_template") {
        let source = std::fs::read_to_string(folder.join("template.jinja")).unwrap();
        let template = ChatTemplate::new(&source, Some("<bos>"), Some("<eos>")).unwrap();
        for case in read_json(&folder.join("expected.json")).as_array().unwrap() {
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
            let tools = Some(&case["tools"]).filter(|tools| !tools.is_null());
            let rendered = template.render(&messages, tools, case["add_generation_prompt"].as_bool().unwrap());
            let place = format!("{}, {}", folder.display(), case["name"]);
            match (rendered, case["expected"].as_str()) {
                (Ok(rendered), Some(expected)) if rendered == expected => {}
                (Err(error), None) if error.to_string().ends_with(case["error"].as_str().unwrap()) => {}
                (rendered, _) => {
                    faults.push(format!("{place}:\n{rendered:?}\n{:?}\n{:?}", case["expected"], case["error"]))
                }
            }
        }
    }
    assert!(faults.is_empty(), "{} differ\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn smollm2_brings_its_template() {
    let template = Pretrained::open(smollm2()).unwrap().chat_template.unwrap();
    let text = template.render(&[Message::new("user", "Hi")], None, true).unwrap();
    assert!(text.ends_with("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"), "{text}");
}

#[test]
fn a_folder_keeps_its_template_in_either_place() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    assert!(ChatTemplate::from_folder(folder.path()).unwrap().is_none());
    write(
        "tokenizer_config.json",
        r#"{"eos_token": {"content": "</s>"}, "chat_template": [{"name": "x", "template": "no"}, {"name": "default", "template": "a{{ eos_token }}"}]}"#,
    );
    let render = || ChatTemplate::from_folder(folder.path()).unwrap().unwrap().render(&[], None, false).unwrap();
    assert_eq!(render(), "a</s>");
    write("chat_template.jinja", "b{{ eos_token }}\n");
    assert_eq!(render(), "b</s>");
}
