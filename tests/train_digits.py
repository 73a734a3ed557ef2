"""A classifier of handwritten digits, trained in plain PyTorch: the script of the README, before its one line."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its name everywhere)


def main(epochs=6):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = load_digits(return_X_y=True)  # 1,797 images of 8x8 pixels, from 0 to 16
    x = torch.tensor(images, dtype=torch.float32, device=device).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, device=device)
    train, test = torch.randperm(len(y), device=device).split((1500, 297))

    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 64, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 10)),
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for epoch in range(epochs):
        for batch in train[torch.randperm(1500, device=device)].split(50):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(x[test]).argmax(1) == y[test]).float().mean().item()
        model.train()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, test accuracy {accuracy:.1%}")
    return model, accuracy


if __name__ == "__main__":
    main()
