use kafold_core::codec::encode;

#[derive(serde::Serialize, serde::Deserialize, Clone, Debug)]
enum OrderEvent {
    Placed,
}

fn main() {
    let _ = encode(&OrderEvent::Placed);
}
