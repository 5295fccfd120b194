from openembed.doctor import problems

FINE = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "sentence-transformers": "6.2.0"}


def found(**versions):
    from openembed.doctor import REQUIRED

    return problems(
        {**dict.fromkeys(REQUIRED, "1.0"), **FINE, **{k.replace("_", "-"): v for k, v in versions.items()}}, lambda _: []
    )


def test_a_sound_installation_has_no_problem():
    assert found() == []


def test_a_release_that_cannot_open_what_is_saved_is_named():
    assert "install 6 or newer" in found(sentence_transformers="5.1.2")[0]


def test_a_cuda_companion_beside_a_cpu_torch_is_named():
    assert "CUDA build beside the CPU build" in found(torchvision="0.28.0")[0]
