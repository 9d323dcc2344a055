//! [`fields`]: JSON with the fields of each object in reverse order. What can be read in both orders can
//! be read in any: the one order has the tags of enums first, the other has them last.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Returns the same JSON with the fields of each object in reverse order.
pub(super) fn fields(json: &[u8]) -> Result<Vec<u8>, serde_json::Error> {
    let mut reversed = Vec::with_capacity(json.len());
    write(serde_json::from_slice(json)?, &mut reversed)?;
    Ok(reversed)
}

/// The fields of an object in their order.
struct Fields<'j>(Vec<(String, &'j RawValue)>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;

        impl<'de> Visitor<'de> for InOrder {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(InOrder)
    }
}

fn write(json: &RawValue, into: &mut Vec<u8>) -> Result<(), serde_json::Error> {
    match json.get().as_bytes().first() {
        Some(b'{') => {
            let Fields(fields) = serde_json::from_str(json.get())?;
            into.push(b'{');
            for (nth, (key, value)) in fields.into_iter().rev().enumerate() {
                if nth > 0 {
                    into.push(b',');
                }
                serde_json::to_writer(&mut *into, &key)?;
                into.push(b':');
                write(value, into)?;
            }
            into.push(b'}');
        }
        Some(b'[') => {
            let elements: Vec<&RawValue> = serde_json::from_str(json.get())?;
            into.push(b'[');
            for (nth, element) in elements.into_iter().enumerate() {
                if nth > 0 {
                    into.push(b',');
                }
                write(element, into)?;
            }
            into.push(b']');
        }
        _ => into.extend_from_slice(json.get().as_bytes()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_reversed_at_each_level() {
        let json = br#"{"a":[1,{"b":2.50,"c":{}}],"d\"":"{","e":[]}"#;
        let reversed = fields(json).expect("is JSON");
        let expected = r#"{"e":[],"d\"":"{","a":[1,{"c":{},"b":2.50}]}"#;
        assert_eq!(String::from_utf8_lossy(&reversed), expected);
    }
}
